"""The flags that messages name are the script's own."""

import ast
import re
from pathlib import Path

import pytest
from helpers import ROOT, run_main

import cifar10.eval
import cifar10.trainer
import imagenet.eval
import imagenet.main
from early_exit import compare, export, predict, serve
from early_exit.cli import program
from early_exit.errors import DataError


def missing(*_arguments, **_options):
    """Stands for a training or an evaluation whose data set has moved."""
    raise DataError("there is no directory /moved")


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (cifar10.trainer, (), {"--data"}),
        (cifar10.eval, ("RUN",), {"--data"}),
        (imagenet.main, (), {"--dummy"}),  # the directory itself has no flag there
        (imagenet.eval, ("RUN",), {"--data"}),
    ],
)
def test_moved_data_is_told_with_the_scripts_own_flags(
    script, arguments, words, monkeypatch, capsys
):
    monkeypatch.setattr(program.training, "train", missing)
    monkeypatch.setattr(program.evaluation, "evaluate_each", missing)
    code, _, err = run_main(script.main, "script", monkeypatch, capsys, *arguments)
    assert code == 2 and err.count("\n") == 1 and "/moved" in err
    named = set(re.findall(r"--[\w-]+", err))
    assert named == words <= set(script.parser()._option_string_actions)


def flags_named(path: Path) -> set[str]:
    """The flags that the strings of a module name."""
    strings = (
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return {flag for text in strings for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)}


def test_every_flag_that_a_message_names_is_one_of_a_script():
    modules = (
        cifar10.trainer,
        cifar10.eval,
        imagenet.main,
        imagenet.eval,
        predict,
        compare,
        export,
        serve,
    )
    parsers = [module.parser() for module in modules]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    known |= {flag for parser in parsers for flag in parser.instead}  # other programs' names
    known |= {"--nproc-per-node", "--shm-size"}  # torchrun's and docker's
    known |= {"--force-reinstall", "--no-deps", "--data-binary"}  # pip's and curl's
    paths = [
        path
        for name in ("early_exit", "cifar10", "imagenet")
        for path in (ROOT / name).rglob("*.py")
    ]
    named = {path: flags_named(path) for path in paths if path.name != "provenance.py"}  # git's
    assert {path: flags - known for path, flags in named.items() if flags - known} == {}
    assert set().union(*named.values()) >= {"--backbone", "--data", "--out"}
