"""macOS, as far as it can be imitated on Linux: calls that it lacks, and processes that are started
anew instead of forked."""

import subprocess
import sys

import pytest
from helpers import ROOT, make_folders

# What differs on macOS for these programs. Directories cannot be synchronised on some of its file
# systems.
MACOS = """
import errno, multiprocessing, os, stat, sys
for name in ("posix_fallocate", "sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
sync = os.fsync
def fsync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    sync(descriptor)
os.fsync = fsync
multiprocessing.set_start_method("spawn")
module, *sys.argv = sys.argv[1:]
from early_exit.cli.border import run
run(module, sys.argv[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="imitates macOS on Linux")
def test_training_evaluation_and_prediction(tmp_path):
    def call(module: str, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-c", MACOS, module, "x.py", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    data, run = make_folders(tmp_path / "set", 16, 8), tmp_path / "run"
    small = (
        "--set",
        "data.train_crop=32",
        "--set",
        "data.val_resize=32",
        "--set",
        "data.val_crop=32",
    )
    network = ("--arch", "resnet18", "--exits", "layer1", "-j", "2", "-b", "8", "--epochs", "1")
    call("imagenet.main", data, *small, *network, "--device", "cpu", "--save-dir", run)
    call("imagenet.eval", run, "--device", "cpu", "--timing-images", "8", "--batch-sizes", "4")
    images = sorted((data / "val" / "ape").iterdir())
    assert len(call("early_exit.predict", run, *images, "--json").splitlines()) == len(images)
