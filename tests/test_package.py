"""`import early_exit`: the names people use, lazily, and what works without torch."""

import importlib
import subprocess
import sys

import pytest
from helpers import ROOT

import early_exit

TORCH_FREE = (
    "early_exit",
    "early_exit.errors",
    "early_exit.inference.criteria",
    "early_exit.inference.policy",
    "early_exit.inference.infer",
    "early_exit.data.pixels",
    "early_exit.data.image_files",
    "early_exit.system.files",
)


def in_a_process(code: str) -> str:
    """What some code prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_importing_needs_no_torch():
    code = f"""
import importlib, sys
sys.modules["torch"] = None  # importing it raises
for name in {TORCH_FREE!r}:
    importlib.import_module(name)
print("fine")
"""
    assert in_a_process(code) == "fine\n"


def test_rows_exit_without_torch():
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
from early_exit.inference.infer import run_segments
from early_exit.inference.policy import Policy

def segment(features, temperature, state):
    logits = features
    return features + 1, logits, logits / temperature, logits[:, 0], state

policy = Policy(exit_names=("early", "final"), thresholds=(3.0,), temperatures=(2.0, 1.0))
images = np.array([[4.0, 0.0], [1.0, 5.0], [3.0, 1.0]])
answers = run_segments([(0, segment), (1, segment)], images, policy)
print(answers.exit_index.tolist(), answers.logits.tolist(), answers.classes.tolist())
"""
    assert in_a_process(code) == ("[0, 1, 0] [[2.0, 0.0], [2.0, 6.0], [1.5, 0.5]] [0, 1, 0]\n")


@pytest.mark.parametrize("name", early_exit._MODULES)
def test_a_name_is_the_one_of_its_module(name):
    module = importlib.import_module(f"early_exit.{early_exit._MODULES[name]}")
    assert getattr(early_exit, name) is getattr(module, name)
    assert name in early_exit.__all__ and name in dir(early_exit)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        early_exit.no_such_name  # noqa: B018


def test_the_version_is_that_of_the_changelog():
    assert early_exit.__version__ in (ROOT / "CHANGELOG.md").read_text()
