"""Tiny trained runs to evaluate, and made-up ones to compare."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from by_hand import TASK, made_logits, train_run
from helpers import CPU
from reports import write_run

from early_exit.choosing.goals import MaxDrop
from early_exit.choosing.record import ExitRecord
from early_exit.evaluation.evaluate import evaluate


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> Path:
    """A joint run with two early exits, already recorded. Not to be changed."""
    directory = train_run(tmp_path_factory.mktemp("real") / "run")
    evaluate(directory, TASK, MaxDrop(0.0), overrides=CPU, live=False, draw=False)
    shutil.rmtree(directory / "eval")
    return directory


@pytest.fixture(scope="session")
def finished(real, tmp_path_factory) -> Path:
    """That run with records made by hand, so that what is chosen on them does not depend on how a
    processor rounds in training. Not to be changed."""
    directory = shutil.copytree(real, tmp_path_factory.mktemp("finished") / "run")
    # with this seed, no two scores are as close as float32 may round (test_rows.py tests it)
    for split, seed in (("val", (176, 3)), ("test", (176, 4))):
        place = directory / "records" / f"{split}-off"
        record = ExitRecord.load(place)
        logits = made_logits(record.targets, seed)
        dataclasses.replace(record, logits=logits).save(place)
    return directory


@pytest.fixture(scope="session")
def one_exit(tmp_path_factory) -> Path:
    """A joint run with one early exit. Not to be changed."""
    return train_run(tmp_path_factory.mktemp("one") / "run", epochs=1, exits=("layer1",))


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A run of the plain network. Not to be changed."""
    return train_run(tmp_path_factory.mktemp("plain") / "run", epochs=1, exits=())


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of `finished`, to be evaluated and changed."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def made_run(tmp_path):
    """Writes a run of a name; see `reports.write_run`."""
    return lambda name, *arguments, **values: write_run(
        tmp_path / "runs" / name, *arguments, **values
    )
