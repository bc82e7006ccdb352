"""An evaluated run, shared by the tests of what users bring."""

import shutil
from pathlib import Path

import pytest
from helpers import TASK, quick_report, tiny_run


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory) -> Path:
    """A run with two early exits, evaluated. Not to be changed."""
    directory = tiny_run(tmp_path_factory.mktemp("extend") / "run", TASK)
    quick_report(directory)
    return directory


@pytest.fixture
def run_copy(evaluated_run, tmp_path) -> Path:
    """A copy of `evaluated_run`, to be changed."""
    return shutil.copytree(evaluated_run, tmp_path / "copy")
