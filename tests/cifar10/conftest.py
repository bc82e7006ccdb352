"""The CIFAR trainer on the tiny network and data."""

from pathlib import Path

import pytest
from helpers import TASK, run_main, train_tiny

from cifar10 import trainer


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The trainer with the tiny network and data; runs/ lies in a temporary directory."""
    monkeypatch.setattr(trainer, "TASK", TASK)
    monkeypatch.setattr(trainer, "RUNS", tmp_path / "runs")


@pytest.fixture
def run(tiny, monkeypatch, capsys):
    """A function that runs the trainer as its command line does: exit code, stdout, stderr."""

    def call(*flags):
        return run_main(trainer.main, "trainer.py", monkeypatch, capsys, *flags)

    return call


@pytest.fixture
def error(run):
    """A function that gives the one line in which an error ends, with exit code 2."""

    def call(*flags) -> str:
        code, _, err = run(*flags)
        assert code == 2
        assert err.startswith("trainer.py: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        return err.removeprefix("trainer.py: ").rstrip("\n")

    return call


@pytest.fixture(scope="session")
def joint(tmp_path_factory) -> Path:
    """A finished joint run of two epochs, exits after layer1 and layer2. Not to be changed."""
    return train_tiny(tmp_path_factory.mktemp("joint") / "run")


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A finished run of the plain network, two epochs. Not to be changed."""
    return train_tiny(tmp_path_factory.mktemp("plain") / "run", "--exits", "none")
