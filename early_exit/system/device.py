"""The device: choosing it, its precision, seeds, memory and name."""

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from early_exit.errors import UserError
from early_exit.system.processors import processors
from early_exit.system.torchrun import local_rank, world_size

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {  # as reports name them
    "bf16": "bfloat16",
    "fp16": "float16",
    "off": "float32",
    "f32": "float32",
    "int8": "8-bit integers",
}


class MachineSettings(Protocol):
    """How a program uses the machine; `early_exit.config.RunConfig` is one."""

    @property
    def device(self) -> str:
        """As `choose_device` takes it."""

    @property
    def amp(self) -> str:
        """As `choose_precision` takes it."""

    @property
    def threads(self) -> int | None:
        """CPU threads; None: as for `set_threads`."""

    @property
    def seed(self) -> int:
        """Of weights, order and augmentation."""

    @property
    def deterministic(self) -> bool:
        """Whether only deterministic algorithms are allowed."""


def set_up(settings: MachineSettings) -> tuple[torch.device, str]:
    """Sets threads, seeds and cuDNN's modes; returns the device and the precision."""
    set_threads(settings.threads)
    seed_everything(settings.seed, settings.deterministic)
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        # otherwise "the current GPU" would be the first one; torch refuses "cuda", without a number
        torch.cuda.set_device(device.index or 0)
    precision = choose_precision(settings.amp, device)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not settings.deterministic
    torch.backends.cudnn.allow_tf32 = precision != "off"  # float32 means float32
    return device, precision


def set_threads(threads: int | None) -> None:
    """Sets torch's CPU threads. None: torch's choice, but no more than the processors that the
    process may use: by itself torch does not see a container's limit."""
    torch.set_num_threads(threads or min(torch.get_num_threads(), processors()))


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one; under torchrun each process gets its own GPU.

    Raises UserError for a device that does not exist.
    """
    several = world_size() > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device: torch.device | None = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"there is no device {name!r}; use cpu, cuda or cuda:1")
    if several and device.index is not None:
        raise UserError(
            f"--device {name} names one GPU, but torchrun gives each process its own; use cuda"
        )
    if several and device.type == "cuda":
        device = torch.device("cuda", local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"there is no device {device}: torch sees {torch.cuda.device_count()} GPUs;"
            " --device cpu always works"
        )
    return device


def choose_precision(amp: str, device: torch.device) -> str:
    """`auto` resolved to bf16 or off; anything else unchanged."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # autocast runs on any processor, but is slow where bfloat16 is emulated
        supported = any(
            getattr(torch.cpu, name, bool)()
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return "bf16" if supported else "off"


def autocast_context(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a network runs in `precision`: bf16, fp16 or off."""
    if precision == "off":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of returning it to the system.

    A training step on the CPU frees and allocates the same megabytes again; mapping them anew takes
    a fifth of its time (benchmarks/training.py). No effect without glibc.
    """
    trim_threshold, mmap_threshold = -1, -3  # glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_device(device: torch.device) -> str:
    """The device in words, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(
            r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8", "replace")
        )
        model = found[1] if found else model
    return f"{model}, {torch.get_num_threads()} threads"


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds torch on every device; `deterministic` allows only deterministic algorithms."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)


def peak_memory(device: torch.device) -> int:
    """The peak in bytes: on a GPU of tensors since `reset_peak_memory`, on a CPU of this process
    since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: torch.device) -> None:
    """Resets a GPU's peak; that of a CPU process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
