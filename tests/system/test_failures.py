"""What machines and users do to a program, as one line."""

import errno
import os

import pytest
import torch
from helpers import assert_names

from early_exit.errors import Unavailable
from early_exit.system.failures import explain

WORKER = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback:\n  File\n{0}: {1}"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError("Unable to allocate 3 GiB"), ("3 GiB", "memory")),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ("memory", "--workers")),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
            ("--accumulate 2",),
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            ("7", "--workers"),
        ),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), ("--workers",)),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"
            ),
            ("/dev/shm", "--shm-size", "shm", "--workers 0"),
        ),
        (
            RuntimeError(WORKER.format("RuntimeError", "unable to write to file </torch_7_1_0>")),
            ("/dev/shm", "--shm-size"),
        ),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x.jpg"), ("ulimit -n", "--workers")),
        (OSError(WORKER.format("OSError", "[Errno 24] Too many open files")), ("ulimit -n",)),
        (RuntimeError("received 0 items of ancdata"), ("ulimit -n",)),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), ("ulimit -u",)),
        (RuntimeError("can't start new thread"), ("ulimit -u", "--threads")),
        (RuntimeError("Could not determine home directory."), ("HOME",)),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), ("TMPDIR",)),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), ("nvidia-smi", "ECC")),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_the_machine_did_may_pass_and_says_what_to_do(error, named):
    found = explain(error)
    assert type(found) is Unavailable and "\n" not in str(found)
    assert_names(str(found), *named)


def test_torchs_own_error_for_too_much_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert_names(str(explain(caught.value)), "memory", "--workers")


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 2), (errno.EROFS, 2), (errno.EISDIR, 2), (errno.ENOSPC, 1), (errno.ESTALE, 1)],
)
def test_an_error_of_the_system_names_its_file(number, code):
    found = explain(OSError(number, os.strerror(number), "runs/x/config.yaml"))
    assert found.code == code
    assert_names(str(found), "runs/x/config.yaml", os.strerror(number))


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (ModuleNotFoundError("No module", name="sklearn.datasets"), ("sklearn", "pip install")),
        (ImportError("libcudart.so.13: cannot open shared object file"), ("libcudart.so.13",)),
        (DeprecationWarning("x is old"), ("DeprecationWarning", "-W error")),
    ],
)
def test_packages_and_warnings(error, named):
    found = explain(error)
    assert found.code == 2
    assert_names(str(found), *named)


def test_what_the_user_forbade():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(1).put_(torch.tensor([0]), torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)
    found = explain(caught.value)
    assert found.code == 2
    assert_names(str(found), "put_", "--deterministic")


def test_a_file_in_dev_shm_is_a_file():
    found = explain(PermissionError(errno.EACCES, "Permission denied", "/dev/shm/data/x.jpg"))
    assert found.code == 2 and "--shm-size" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        ValueError("x"),
        RuntimeError("shapes differ"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 131072"),
        ModuleNotFoundError("No module", name="early_exit.nothing"),
    ],
    ids=repr,
)
def test_an_error_in_the_program_is_not_explained(error):
    assert explain(error) is None
