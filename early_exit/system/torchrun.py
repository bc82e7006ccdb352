"""The variables that torchrun sets for its processes, and a line printed after its own output."""

import contextlib
import os
import sys
from pathlib import Path

LAST_LINE = "EARLY_EXIT_LAST_LINE"
"""The environment variable that names a file for the line a program ends with."""


def rank() -> int:
    """The number of this process among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The number of this process on its machine, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def say_last(line: str) -> None:
    """Adds the line a program ends with to the file that EARLY_EXIT_LAST_LINE names. Without that
    file, and if torchrun started this process, prints it again when torchrun has ended.

    torchrun prints a traceback of its own after the last line of its processes, also when it was
    asked to stop. Only a process that outlives it can write below that.
    """
    if LAST_LINE in os.environ:
        with contextlib.suppress(OSError):
            with open(os.environ[LAST_LINE], "a", errors="backslashreplace") as file:
                file.write(f"{line}\n")
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        import subprocess  # here: scripts import this module before they handle Ctrl-C

        code = f"from {__name__} import print_after; print_after({os.getppid()}, {line!r})"
        root = str(Path(__file__).parents[2])
        with contextlib.suppress(OSError):  # such as too many open files
            subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # torchrun ends the process groups of the others
            )


def print_after(pid: int, line: str, seconds: float = 100) -> None:
    """Prints a line on standard error when a process has ended, or after so many seconds."""
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end and _runs(pid):
        time.sleep(0.01)
    print(line, file=sys.stderr, flush=True)


def _runs(pid: int) -> bool:
    """Whether a process has not ended; a zombie has."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
