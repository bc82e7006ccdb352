"""Every script's --help, also under `python -OO`, which removes docstrings."""

import ast
import functools
import json
import subprocess
import sys

import pytest
from helpers import ROOT

from early_exit.cli import flags

FOLDERS = ("cifar10", "imagenet", "benchmarks", "docs-src", "early_exit")


def found() -> list[str]:
    """Every script by its path, or as `-m NAME` where it is a module of the library."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    names = [path.relative_to(ROOT) for path in paths if "__main__" in path.read_text()]
    return [
        f"-m {'.'.join(name.with_suffix('').parts)}" if name.parts[0] == "early_exit" else str(name)
        for name in names
    ]


SCRIPTS = found()


@functools.cache
def helps(*mode: str) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of every script's --help; `mode`: flags of the interpreter."""
    command = [sys.executable, *mode, str(ROOT / "tests/helpers.py"), "help", *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return dict(zip(SCRIPTS, map(json.loads, lines), strict=True))


def test_the_scripts_are_found():
    assert {
        "cifar10/trainer.py",
        "imagenet/eval.py",
        "benchmarks/inference.py",
        "docs-src/figures/oracle.py",
        "-m early_exit.predict",
    } <= set(SCRIPTS)


# torch is compiled anew for -OO, which takes ten seconds where it has never been run
OPTIMISED = pytest.param(("-OO",), id="OO", marks=pytest.mark.slow)


@pytest.mark.parametrize("mode", [pytest.param((), id="plain"), OPTIMISED])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, mode):
    code, out, err = helps(*mode)[script]
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: python {script}")
    assert "--help" in out.partition("options:")[2]
    assert "None" not in out.partition("options:")[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_docstring_unchanged(script):
    name = script.removeprefix("-m ")
    path = ROOT / (name if name == script else f"{name.replace('.', '/')}.py")
    summary, _, examples = ast.get_docstring(ast.parse(path.read_text()), clean=False).partition(
        "\n\n"
    )
    _, out, _ = helps()[script]
    assert examples.rstrip() in out
    assert " ".join(summary.split()) in " ".join(out.split())


def test_percent_signs_are_shown():
    docstring = "Half.\n\n    python x.py 60   60 % exit, %(prog)s and %d mean nothing, 100%%\n"
    shown = flags.build_parser("x.py", "python x.py [%]", docstring).format_help()
    assert shown.startswith(f"usage: python x.py [%]\n\n{docstring.partition(chr(10) * 2)[2]}")


def test_without_a_docstring_there_is_the_usage_alone():
    shown = flags.build_parser("x.py", "python x.py [flags]", None).format_help()
    assert shown.startswith("usage: python x.py [flags]\n\noptions:\n")
