"""Runs that are resumed, and what they must equal."""

import shutil
from pathlib import Path

import pytest
from helpers import Crash, at_batch, crash, mixed_config, resume_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The run of `mixed_config`, never stopped. Not to be changed."""
    return resume_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="session")
def whole_joint(tmp_path_factory) -> Path:
    """The same in the joint regime: two epochs of three steps."""
    return resume_run(tmp_path_factory.mktemp("joint") / "run", mixed_config(regime="joint"))


@pytest.fixture(scope="session")
def whole_frozen(tmp_path_factory) -> Path:
    """The same in the frozen regime: one epoch of the backbone, two of the heads."""
    return resume_run(tmp_path_factory.mktemp("frozen") / "run", mixed_config(regime="frozen"))


@pytest.fixture(scope="session")
def killed(tmp_path_factory) -> Path:
    """A run of `mixed_config` that was killed in the last epoch. Not to be changed."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, 7, crash)
        with pytest.raises(Crash):
            resume_run(directory)
    return directory


@pytest.fixture
def half(killed, tmp_path) -> Path:
    """A copy of `killed`, to be resumed."""
    return shutil.copytree(killed, tmp_path / "half")
