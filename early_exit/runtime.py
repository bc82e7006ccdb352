"""The machine: device, precision, seeds, signals, what versions ran."""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import os
import platform
import re
import resource
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from early_exit.distributed import local_rank, world_size
from early_exit.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "off": "float32"}  # as reports name them


class Stopped(BaseException):
    """A signal asked for the end and what matters is saved; `code` is the exit code to leave with.

    No Exception, so that nobody who expects mistakes takes it for one.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.code = 128 + signum


def leave_on_sigterm() -> None:
    """Lets SIGTERM raise Stopped, as SIGINT raises KeyboardInterrupt: the first process of a
    container would not hear it at all."""

    def leave(signum: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise Stopped(f"stopped by signal {signum}; there was nothing to save", signum)

    signal.signal(signal.SIGTERM, leave)


class Interrupted(BaseException):
    """A signal came where `StopSignals` was told to heed it."""


class StopSignals:
    """Within its context SIGTERM and SIGINT only set `signum`; the loop looks at it when it can.

    A second signal changes nothing, so it cannot tear the file being written.

    Where the loop may take long to look (a compilation) and what it does need not be saved, it
    calls `heed`: until `at_once` is cleared the first signal then raises Interrupted.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.at_once = False

    def __enter__(self) -> "StopSignals":
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def heed(self) -> None:
        """Lets the first signal, also one that came already, raise Interrupted."""
        self.at_once = True
        if self.signum is not None:
            raise Interrupted

    def _note(self, signum: int, _frame: object) -> None:
        if self.signum is None:
            self.signum = signum
            if self.at_once:
                raise Interrupted


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; of several processes each gets a GPU of its own."""
    several = world_size() > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"there is no device {name!r}; try cpu, cuda or cuda:1")
    if several and device.index is not None:
        raise UserError(f"device {name} is one, torchrun's processes each have their own; drop it")
    if several and device.type == "cuda":
        device = torch.device("cuda", local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device} was asked for, torch sees {torch.cuda.device_count()} GPUs here;"
            " --device cpu always works"
        )
    return device


def choose_precision(amp: str, device: torch.device) -> str:
    """`auto` resolved to bf16 or off; anything else as it is."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        fit = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # autocast runs on any processor, but is slow where bfloat16 is emulated
        fit = any(
            getattr(torch.cpu, name, bool)()
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return "bf16" if fit else "off"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a network runs in `precision`: bf16, fp16 or off."""
    if precision == "off":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed for the next step instead of giving it back.

    A training step on the CPU frees and asks for the same megabytes again; having the system map
    them anew costs a fifth of its time (benchmarks/training.py). No effect but with glibc.
    """
    trim_threshold, mmap_threshold = -1, -3  # glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_device(device: torch.device) -> str:
    """The device in words, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    return f"{model}, {torch.get_num_threads()} threads"


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds torch on every device; with `deterministic`, only deterministic algorithms run."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)


def peak_memory(device: torch.device) -> int:
    """Most bytes that were held at once: on a GPU by tensors since `reset_peak_memory`, on a CPU by
    this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: torch.device) -> None:
    """Forgets a GPU's peak; a CPU's cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def check_torchvision() -> None:
    """Raises one clear sentence where torch and torchvision don't belong together."""
    torch_version = importlib.metadata.version("torch").partition("+")[0]
    try:
        vision_version = importlib.metadata.version("torchvision")
        needs = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "torchvision is not installed; run: pip install -r requirements.txt"
        ) from None
    wanted = next((need for need in needs if re.match(r"torch\b", need)), "")
    fits = all(
        _compare(_numbers(torch_version), operator, _numbers(version))
        for operator, version in re.findall(r"(==|>=)\s*([\d.]+)", wanted)
    )
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError, AttributeError):
        fits = False
    if not fits:
        said = f" (it asks for {wanted})" if wanted else ""
        raise UserError(
            f"torch {torch_version} and torchvision {vision_version} do not belong together{said};"
            " install both anew: pip install --force-reinstall torch torchvision"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _compare(have: tuple[int, ...], operator: str, want: tuple[int, ...]) -> bool:
    return have == want if operator == "==" else have >= want


def versions() -> dict[str, str]:
    """Python, the packages that matter, and the git revision the program runs from."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy"):
        found[package] = importlib.metadata.version(package)
    found["git"] = git_revision()
    return found


@functools.cache
def git_revision() -> str:
    """The commit of this source tree, with -dirty where it was changed; where it is none, as in an
    image, what EARLY_EXIT_REVISION says."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("EARLY_EXIT_REVISION", "unknown")
    return done.stdout.strip()
