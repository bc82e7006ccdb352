"""Where machines vanish and disks fill up: what a program says, saves and exits with.

A pid namespace makes it the first process, as in a container, and a mount of its own a small disk.
"""

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, TINY, children, finish, start, wait_for, wait_for_file

from early_exit.system import locks
from early_exit.training import checkpoint

SPACES = ("unshare", "--map-root-user", "--pid", "--mount", "--fork", "--kill-child")
LEAST = ("--exits", "layer1")
FULL = os.strerror(errno.ENOSPC)


@pytest.fixture(scope="module")
def spaces() -> tuple[str, ...]:
    """A command that gives what it runs the number 1, and mounts of its own."""
    try:
        subprocess.run([*SPACES, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no namespaces of one's own here ({error})")
    return SPACES


def train(directory: Path, *flags: object, signals=("none", 0), **options):
    """The tiny trainer into `directory`, to its end."""
    return finish(
        start(
            "tests/helpers.py",
            *signals,
            *TINY,
            *LEAST,
            "--save-dir",
            directory,
            *flags,
            cwd=directory.parent,
            **options,
        )
    )


def position(directory: Path) -> dict[str, int]:
    """Where the checkpoint of a run stands."""
    return checkpoint.load(directory)["position"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that was not interrupted."""
    directory = tmp_path_factory.mktemp("cluster") / "run"
    assert train(directory).returncode == 0
    return directory


class TestFirstProcess:
    """Python as process 1 ignores SIGTERM unless it has a handler."""

    @pytest.mark.slow
    def test_training_saves_and_the_next_one_resumes(self, spaces, tmp_path):
        directory = tmp_path / "run"
        done = train(directory, "--resume", "auto", signals=("SIGTERM", 8), inside=spaces)
        assert done.returncode == 143
        assert done.stderr.startswith("trainer.py: ") and done.stderr.count("\n") == 1
        assert "15" in done.stderr and str(directory) in done.stderr
        stopped = position(directory)
        assert stopped["epoch"] == 1 and stopped["step"] > 0
        done = train(directory, "--resume", "auto", inside=spaces)
        assert done.returncode == 0
        assert str(directory / checkpoint.NAME) in done.stdout  # what it began with
        assert position(directory)["phase"] == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("batch", [0, 1, 3], ids=["val", "test", "later"])
    def test_an_evaluation_stops_and_can_be_made_again(self, spaces, run, tmp_path, batch):
        flags = ("eval", run, "--no-plots", "--timing-images", "8", "--batch-sizes", "1")
        name = ("--name", f"stopped-{batch}")
        done = finish(
            start("tests/helpers.py", "SIGTERM", batch, *flags, *name, cwd=tmp_path, inside=spaces)
        )
        assert done.returncode == 143
        *log, last = done.stderr.splitlines()
        assert last.startswith("eval.py: ") and "15" in last
        assert not any("Traceback" in line for line in log)
        assert not (run / "eval" / name[1]).exists()
        assert not list(run.rglob("*.partial"))

    def test_the_shell_of_the_interactive_pod_ends_on_sigterm(self, spaces):
        (pod,) = yaml.safe_load_all((ROOT / "docker" / "interactive_pod.yaml").read_text())
        process = subprocess.Popen([*spaces, *pod["spec"]["containers"][0]["command"]])
        try:
            (shell,) = wait_for(lambda: children(process.pid), "the shell")
            wait_for(lambda: children(shell), "what the shell starts after its handler")
            os.kill(shell, signal.SIGTERM)
            process.wait(timeout=120)  # it would sleep for ever
        finally:
            process.kill()

    def test_a_python_without_a_handler_would_continue(self, spaces):
        # what the tests above would not notice otherwise
        ignoring = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('still here')"
        out = subprocess.check_output([*spaces, sys.executable, "-c", ignoring], text=True)
        assert out == "still here\n"

    @pytest.mark.slow
    @pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_a_compilation_is_not_waited_for(self, tmp_path, split):
        # a compiler that notes that it was called, and does nothing while it is held
        compiler, called, held = (tmp_path / name for name in ("compiler", "called", "held"))
        compiler.write_text(
            f"#!/bin/sh\necho >> {called}\nwhile [ -e {held} ]; do sleep 0.1; done\n"
            f'exec {shutil.which("g++")} "$@"\n'
        )
        compiler.chmod(0o755)
        called.touch()
        if split == "train":
            held.touch()
        process = start(
            "tests/helpers.py",
            "none",
            0,
            *TINY,
            *LEAST,
            "--save-dir",
            tmp_path / "run",
            "--compile",
            "-p",
            "1",
            cwd=tmp_path,
            CXX=str(compiler),
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        )
        try:
            if split == "val":  # whose compilation follows the last step
                next(line for line in process.stdout if "6/6" in line)
                held.touch()
            calls = called.stat().st_size
            wait_for(lambda: called.stat().st_size > calls, "a compilation", seconds=300)
            process.send_signal(signal.SIGTERM)
            if split == "val":  # Python's end waits for compilers that run, the program does not
                wait_for_file(tmp_path / "run" / checkpoint.NAME, process)
            else:
                process.wait(timeout=120)
        finally:
            held.unlink()
            done = finish(process)
        assert done.returncode == 143, done.stderr
        if split == "val":
            assert position(tmp_path / "run") == {"phase": 0, "epoch": 0, "step": 6}
        else:
            assert not (tmp_path / "run" / checkpoint.NAME).exists()


class TestExitCodes:
    """0 done, 2 a user error, 143 and 130 stopped and saved (test_kills.py), 1 anything else."""

    @pytest.mark.slow
    def test_done(self, run):
        assert checkpoint.load(run)["position"]["phase"] == 1

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (("--lrr", "1"), "--lrr"),
            (("--exits", "layer9"), "layer9"),
            (("--backbone", "none.pt", "--regime", "frozen"), "none.pt"),
        ],
    )
    def test_a_user_error(self, tmp_path, flags, named):
        done = train(tmp_path / "run", *flags)
        assert done.returncode == 2
        assert done.stderr.startswith("trainer.py: ") and done.stderr.count("\n") == 1
        assert named in done.stderr

    @pytest.mark.slow
    def test_a_directory_in_use(self, run):
        with locks.locked(run):
            done = train(run, "--resume", "auto")
        assert done.returncode == 1
        assert done.stderr.startswith("trainer.py: ") and done.stderr.count("\n") == 1
        assert str(run) in done.stderr and "--save-dir" in done.stderr

    @pytest.mark.slow
    def test_an_unexpected_error(self, tmp_path):
        broken = "from early_exit.cli import border; border.run(lambda _: 1 / 0, 'trainer.py')"
        done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True)
        assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.slow
class TestDisk:
    @pytest.fixture
    def on_a_disk(self, spaces, tmp_path):
        """Runs the tiny trainer into a directory of a file system with the given options, and tells
        what lies there afterwards."""

        def run(
            options: str, then: str = "true", flags: tuple[str, ...] = ()
        ) -> tuple[subprocess.CompletedProcess, list[str]]:
            mounted = tmp_path / "mounted"
            mounted.mkdir()
            command = [
                sys.executable,
                str(ROOT / "tests/helpers.py"),
                "none",
                "0",
                *TINY,
                *LEAST,
                "--save-dir",
                str(mounted / "run"),
                *flags,
            ]
            script = (
                f"mount -t tmpfs -o {options} none {shlex.quote(str(mounted))} &&"
                f" {shlex.join(command)}; code=$?; {then}; exit $code"
            )
            done = subprocess.run(
                [*spaces, "bash", "-c", script],
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            return done, done.stdout.splitlines()[-1:]

        return run

    def test_a_full_one_is_one_line_and_the_last_good_checkpoint_stays(self, on_a_disk, run):
        room = int(1.8 * (run / checkpoint.NAME).stat().st_size)  # for one, and most of a second
        load = (
            "from pathlib import Path; from early_exit.training import checkpoint;"
            " print(checkpoint.load(Path('mounted/run'))['position'])"
        )
        done, last = on_a_disk(f"size={room}", shlex.join([sys.executable, "-c", load]))
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert FULL in done.stderr
        assert last == ["{'phase': 0, 'epoch': 1, 'step': 0}"]

    def test_a_full_one_from_the_start(self, on_a_disk):
        done, _ = on_a_disk("size=8k")
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert FULL in done.stderr and "mounted/run" in done.stderr

    @pytest.mark.parametrize("flags", [(), ("--check",)])
    def test_one_that_cannot_be_written(self, on_a_disk, flags):
        done, _ = on_a_disk("ro", flags=flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "mounted" in done.stderr and "--save-dir" in done.stderr
