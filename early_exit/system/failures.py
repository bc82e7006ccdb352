"""Errors of the machine or of the installation, in one line: memory, processes, files and packages
that are missing. Any other unexpected error is an error in the program."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from early_exit.errors import Unavailable, UserError
from early_exit.system.disk_errors import kind_of

INSTALL = "run: pip install -r requirements.txt"

# What is found in the type and the message of an error, also of one that a loader's worker handed
# on as a text; the first match counts. torch and multiprocessing have no types for these.
MACHINE = {
    r"Too many open files|ancdata": (
        "too many open files: raise the limit of {files} with ulimit -n, or use fewer --workers"
    ),
    r"[Bb]us error|</?torch_\d|out of shared memory|No space left on device.*/dev/shm": (
        "/dev/shm is full{shm}, through which the loader's workers hand over their images: make it"
        " larger (docker run --shm-size=8g; in a pod, sizeLimit of the volume shm), or use"
        " --workers 0"
    ),
    r"DataLoader worker .*(killed by signal|exited unexpectedly)": (
        "a worker process that loads images was killed ({detail}): usually memory ran out; use"
        " fewer --workers, or give the machine or the pod more memory"
    ),
    r"(?i)cuda.*out of memory|gpu.*out of memory|CU(BLAS|DNN)_STATUS_\w*ALLOC": (
        "the GPU is out of memory ({detail}): use smaller batches; in training, --accumulate 2"
        " computes a step in two halves"
    ),
    r"(?i)MemoryError|out of memory|can.?not allocate memory|can't allocate memory|not enough"
    r" memory|bad_alloc|failed to map segment": (
        "memory ran out ({detail}): use smaller batches or fewer --workers, or give the machine or"
        " the pod more memory"
    ),
    r"can't start new thread|BlockingIOError.*fork|Resource temporarily unavailable": (
        "no more processes or threads can be started ({detail}): raise the limit of {processes}"
        " with ulimit -u or that of the pod, or use fewer --workers and --threads"
    ),
    r"CUDA error: (?!device-side|an illegal|misaligned|invalid config|invalid arg)"  # in a program
    r"|CUDA driver|NVIDIA driver": (
        "the GPU cannot be used ({detail}): check it with nvidia-smi, or use --device cpu"
    ),
    r"determine home directory|getpwuid|No username set": (
        "this user has no home directory ({detail}): set HOME to a directory that can be written"
    ),
    r"No usable temporary directory": (
        "no temporary directory can be written: set TMPDIR to one that can, with free space"
    ),
}
# What torch raises for an operation of a network under --deterministic.
NOT_DETERMINISTIC = " does not have a deterministic implementation"


def explain(error: BaseException) -> UserError | None:
    """An error as the line for the user; None for an error in the program."""
    if lacking := explain_machine(error):
        return lacking
    if NOT_DETERMINISTIC in str(error):
        operation = str(error).partition(NOT_DETERMINISTIC)[0].strip()
        return UserError(
            f"{operation} has no deterministic implementation on this device, and this network"
            " needs it; leave --deterministic out"
        )
    if isinstance(error, ImportError):
        return _missing(error)
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, Warning):
        return UserError(
            f"a warning was turned into an error ({type(error).__name__}: {_last_line(error)}):"
            " remove -W error or PYTHONWARNINGS"
        )
    return None


def explain_machine(error: BaseException) -> Unavailable | None:
    """An error of what a machine lacks as the line for its user; None for any other error."""
    text = f"{type(error).__name__}: {error}"
    for pattern, line in MACHINE.items():
        if re.search(pattern, text):
            return Unavailable(line.format(detail=_last_line(error), **_limits(line)))
    return None


def _missing(error: ImportError) -> UserError | None:
    """A package that is missing or cannot be loaded."""
    name = (error.name or "").partition(".")[0]
    if name == "early_exit":
        return None
    if isinstance(error, ModuleNotFoundError):
        return UserError(f"the package {name} is not installed; {INSTALL}")
    return UserError(f"a package cannot be imported ({_last_line(error)}); {INSTALL}")


def _of_the_system(error: OSError) -> UserError:
    """A call of the system that failed: which file, and why."""
    kind = kind_of(error)
    if error.errno is None:  # a library's
        return kind(_last_line(error))
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return kind(f"{files or 'a call of the system failed'}: {error.strerror}")


def _last_line(error: BaseException) -> str:
    """The last line of a message, which is the error itself where a worker handed it on with its
    traceback; of several sentences the first ones."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join((lines[-1] if "Traceback" in str(error) else lines[0]).split())[:200]


def _limits(line: str) -> dict[str, object]:
    """The limits of the machine that a line names."""
    limits: dict[str, object] = {"shm": ""}
    for name, number in (("files", "RLIMIT_NOFILE"), ("processes", "RLIMIT_NPROC")):
        soft = resource.getrlimit(getattr(resource, number))[0]
        limits[name] = "no limit" if soft == resource.RLIM_INFINITY else soft
    if Path("/dev/shm").is_dir():
        size = os.statvfs("/dev/shm")
        limits["shm"] = f" (it has {size.f_blocks * size.f_frsize / 2**20:.0f} MiB)"
    return limits
