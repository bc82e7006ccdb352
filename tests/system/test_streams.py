"""What becomes of a program whose output nobody takes, or whose encoding lacks letters.

Each program is a process of its own that does its work, here a file, whatever happens.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

# `border.run` without the imports that it needs for other things
QUICK = """
def run(main, prog, log_on_stdout):
    streams.set_up(logging.INFO, log_on_stdout)
    try:
        main(None)
        streams.finish(prog)
    except Unavailable as error:
        streams.make_optional()
        sys.stdout.flush()
        sys.exit(print(f"{prog}: {error}", file=sys.stderr) or error.code)
    except streams.ReaderEnded:
        sys.exit(1)
"""
REAL = """
from early_exit.cli.border import run
"""
PROGRAM = """
import logging, pathlib, sys
from early_exit.errors import Unavailable
from early_exit.system import streams

RUN

def main(_):
    if "optional" in sys.argv:
        streams.make_optional()
    logging.info("a line of the log")
    logging.warning("a warning")
    for _ in range(20000):
        print("an answer \\xb1")
    pathlib.Path("done").write_text("")

run(main, "prog", log_on_stdout="log" in sys.argv)
"""
STDERR = ["a line of the log", "a warning"]


@pytest.fixture(params=[QUICK, pytest.param(REAL, marks=pytest.mark.slow)], ids=["quick", "real"])
def run(request, tmp_path):
    """Runs the program in a shell: its exit code, its output, the lines on its standard error."""
    (tmp_path / "program.py").write_text(PROGRAM.replace("RUN", request.param))

    def run(redirection: str, *words: str, **env: str) -> tuple[int, str, list[str]]:
        command = f"{shlex.quote(sys.executable)} program.py {' '.join(words)} {redirection}"
        done = subprocess.run(
            ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )
        return done.returncode, done.stdout, done.stderr.splitlines()

    return run


def test_answers_go_to_standard_output_and_words_to_standard_error(run):
    code, out, lines = run("")
    assert (code, lines) == (0, STDERR)
    assert set(out.splitlines()) == {"an answer \xb1"}


def test_a_log_can_be_the_output_but_warnings_never_are(run):
    code, out, lines = run("", "log")
    assert (code, lines) == (0, STDERR[1:])
    assert out.startswith("a line of the log\n")


def test_what_an_encoding_lacks_is_escaped(run):
    code, out, lines = run("", PYTHONIOENCODING="ascii")
    assert (code, lines) == (0, STDERR)
    assert set(out.splitlines()) == {r"an answer \xb1"}


def test_a_reader_that_ends_ends_the_program_without_a_word(run, tmp_path):
    code, out, lines = run("| head -n 1")
    assert (code, out, lines) == (1, "an answer \xb1\n", STDERR)
    assert not (tmp_path / "done").exists()


def test_a_reader_that_ends_does_not_end_a_program_whose_output_is_optional(run, tmp_path):
    code, _, lines = run("| head -n 1", "optional", "log")
    assert (code, lines) == (0, STDERR[1:])
    assert (tmp_path / "done").exists()


FULL = pytest.param(
    "> /dev/full", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
)


@pytest.mark.parametrize("redirection", [FULL, ">&-"])
def test_output_that_cannot_be_written_is_one_line(run, redirection):
    code, _, lines = run(redirection)
    assert code == 1
    assert lines[:2] == STDERR and len(lines) == 3
    assert lines[2].startswith("prog: ")


@pytest.mark.parametrize("redirection", [FULL, ">&-"])
def test_a_required_log_that_cannot_be_written_is_one_line(run, redirection):
    code, _, lines = run(redirection, "log")
    assert code == 1
    assert [line.startswith("prog: ") for line in lines].count(True) == 1
    assert set(lines[:-1]) <= {"a warning"}


@pytest.mark.parametrize("redirection", [FULL, ">&-"])
def test_a_program_whose_output_is_optional_does_its_work(run, tmp_path, redirection):
    code, _, lines = run(redirection, "optional", "log")
    assert code == 0 and (tmp_path / "done").exists()
    assert lines[0] == "a warning" and len(lines) == 2
    assert lines[1].startswith("prog: ")


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full"])
def test_words_that_cannot_be_written_stop_nothing(run, redirection):
    code, out, lines = run(redirection)
    assert (code, lines) == (0, [])
    assert set(out.splitlines()) == {"an answer \xb1"}
