"""What the programs say of a data set that is missing."""

import re

import pytest
from helpers import run_main

import cifar10.eval
import cifar10.trainer
import imagenet.eval
import imagenet.main
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
    monkeypatch.setattr(program.evaluation, "evaluate", missing)
    code, _, err = run_main(script.main, "script", monkeypatch, capsys, *arguments)
    assert code == 2 and err.count("\n") == 1 and "/moved" in err
    named = set(re.findall(r"--[\w-]+", err))
    assert named == words <= set(script.parser()._option_string_actions)
