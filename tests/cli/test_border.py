"""The border of every command: whatever happens is one line and the documented exit code."""

import ast
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, assert_names, finish, run_main, start

from early_exit.errors import Failed, Unavailable, UserError
from early_exit.system import signals, torchrun

SCRIPTS = sorted(
    path
    for folder in ("cifar10", "imagenet", "benchmarks", "docs-src", "early_exit")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
# What a script needs before the version of Python is looked at.
EARLY = [
    ROOT / "early_exit" / name
    for name in (
        "__init__.py",
        "errors.py",
        "cli/__init__.py",
        "cli/border.py",
        "system/__init__.py",
        "system/signals.py",
        "system/torchrun.py",
    )
]


@pytest.fixture
def ended(monkeypatch, capsys):
    """A function that runs a `main` which raises an error: exit code, stdout and stderr."""

    def ended(error: BaseException) -> tuple[int, str, str]:
        def main(_):
            raise error

        return run_main(main, "x.py", monkeypatch, capsys)

    return ended


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("--lr is wrong"), 2),
        (Unavailable("in use"), 1),
        (Failed("diverged"), 1),
        (signals.Stopped("stopped", signal.SIGTERM), 143),
        (signals.Stopped("stopped", signal.SIGHUP), 129),
        (KeyboardInterrupt(), 130),
        (PermissionError(errno.EACCES, "no right", "config.yaml"), 2),
        (OSError(errno.EIO, "storage fails", "config.yaml"), 1),
        (MemoryError(), 1),
    ],
    ids=repr,
)
def test_an_end_is_one_line_and_its_code(ended, error, code):
    found, _, err = ended(error)
    assert found == code
    assert err.startswith("x.py: ") and err.count("\n") == 1


def test_a_message_of_several_lines_is_one(ended):
    assert ended(UserError("a\nb"))[2] == "x.py: a b\n"


def test_an_error_in_the_program_shows_where_and_ends_with_one_line(ended):
    code, _, err = ended(KeyError("x"))
    assert code == 1 and "Traceback" in err and "KeyError" in err
    assert err.splitlines()[-1].startswith("x.py: ")


def test_an_old_python_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    code, _, err = run_main(lambda _: None, "x.py", monkeypatch, capsys)
    assert code == 2 and err.count("\n") == 1
    assert_names(err, "3.11")


@pytest.mark.parametrize("path", [*SCRIPTS, *EARLY], ids=lambda path: path.name)
def test_an_old_python_can_read_what_comes_before(path):
    ast.parse(path.read_text(), feature_version=(3, 7))


def test_a_script_finds_its_own_checkout_through_a_link(tmp_path):
    (tmp_path / "trainer.py").symlink_to(ROOT / "cifar10" / "trainer.py")
    done = subprocess.run(  # -S: no checkout is installed, nor torch
        [sys.executable, "-S", tmp_path / "trainer.py"],
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_calls_it_before_it_imports_anything_else(path):
    first, *_ = [node for node in ast.parse(path.read_text()).body if not is_docstring(node)]
    assert isinstance(first, ast.If)
    imported = {
        name.name for node in ast.walk(first) if isinstance(node, ast.Import) for name in node.names
    }
    assert imported <= {"os", "sys"}
    called = ast.unparse(first.body[-1])
    assert called.startswith("run(") and path.stem in called


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_the_border_itself_imports_nothing_that_takes_long():
    code = "import sys; import early_exit.cli.border; print(*sys.modules)"
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert not {"torch", "numpy", "yaml", "torchvision"} & set(out.split())


IMPORTING = """
import os, signal, sys
module = sys.argv[1] + "/slow_script.py"
open(module, "w").write("import os, signal; os.kill(os.getpid(), signal.{signum})")
open(sys.argv[1] + "/torchvision.py", "w").close()  # the real one takes seconds
sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)
from early_exit.cli.border import run
run("slow_script", "slow.py")
"""


@pytest.mark.parametrize(("signum", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_during_the_imports(tmp_path, signum, code):
    """The script's module sends it: it is being imported then."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING.replace("{signum}", signum), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stderr.startswith("slow.py: ") and done.stderr.count("\n") == 1


def test_a_script_runs_from_its_checkout_and_names_a_package_that_is_missing(tmp_path):
    (tmp_path / "torchvision.py").write_text("import torch")
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module\", name='torch')")
    done = subprocess.run(
        [sys.executable, str(ROOT / "cifar10/trainer.py"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert_names(done.stderr, "torch", "pip install -r requirements.txt")


def test_a_working_directory_that_is_gone(tmp_path):
    code = (
        "import os, sys; os.mkdir('x'); os.chdir('x'); os.rmdir('../x');"
        "from early_exit.cli.border import run; run(lambda _: os.getcwd(), 'x.py')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "working directory" in done.stderr


class TestLastLine:
    """Under torchrun, which writes a traceback of its own at its end."""

    def test_a_file_that_the_environment_names_gets_it(self, ended, monkeypatch, tmp_path):
        monkeypatch.setenv(torchrun.LAST_LINE, str(tmp_path / "last"))
        for message in ("first", "second"):
            ended(UserError(message))
        assert (tmp_path / "last").read_text() == "x.py: first\nx.py: second\n"

    def test_a_file_that_cannot_be_written_changes_nothing(self, ended, monkeypatch, tmp_path):
        monkeypatch.setenv(torchrun.LAST_LINE, str(tmp_path))
        assert ended(UserError("first")) == (2, "", "x.py: first\n")

    def test_it_comes_once_the_process_has_ended(self, capfd):
        process = subprocess.Popen([sys.executable, "-c", ""])
        torchrun.print_after(process.pid, "x.py: last")  # it is not waited for before
        assert capfd.readouterr().err == "x.py: last\n"
        assert process.wait() == 0

    @pytest.mark.slow
    def test_torchruns_own_last_words_come_before_it(self, tmp_path):
        (tmp_path / "run" / "x").mkdir(parents=True)
        flags = ("--dataset", "digits", "--device", "cpu", "--save-dir", tmp_path / "run")
        done = finish(start("cifar10/trainer.py", *flags, cwd=tmp_path, processes=2))
        assert done.returncode == 1 and "ChildFailedError" in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("trainer.py: ")
        assert_names(last, tmp_path / "run", "--resume auto")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize(
    ("code", "redirection", "named"),
    [
        ("sys.exit(print('usage'))", "> /dev/full", "standard output"),  # as argparse for --help
        ("sys.stdin.read()", "<&-", os.strerror(errno.EBADF)),
    ],
    ids=["help", "stdin"],
)
def test_streams_that_cannot_be_used_are_one_line(code, redirection, named):
    program = (
        "import sys; from early_exit.cli import border; border._import = lambda main, _: main;"
        f" border.run(lambda _: {code}, 'x.py')"
    )
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert_names(line, "x.py", named)
