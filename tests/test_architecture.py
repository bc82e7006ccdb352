"""How the code hangs together: imports point down, importing does nothing, and nothing is ever
chosen on test."""

import ast
import inspect
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch

import early_exit
from early_exit import evaluation
from early_exit.config import Config
from early_exit.cost import network_cost
from early_exit.choosing import Goal, choose
from early_exit.evaluation import evaluate
from early_exit.experiment import FrontDoor
from early_exit.policy import Policy
from early_exit.records import replay
from early_exit.trained import Trained

PACKAGE = Path(early_exit.__file__).parent
# Low to high: a module may import only modules named before it.
ORDER = (
    "errors", "disk",
    "pixels", "heads", "losses", "criteria", "metrics", "calibration", "config", "checkpoint",
    "distributed", "runtime", "splits", "tensors",
    "network", "policy", "cost", "energy",
    "records", "overthinking", "thresholds", "search", "guarantees", "cdl", "inference",
    "engine", "journal", "latency", "choosing", "report", "wording", "plots",
    "experiment",
    "resuming", "epochs", "training",
    "trained", "classifier", "findings", "charts", "page", "evaluation",
    "recipes", "labels",
    "flags", "cli",
    "compare", "predict", "export",
)
SOURCES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def imports(path):
    """Every module that a file imports, at its top or inside a function, by its dotted name; of
    `from early_exit import x` early_exit.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module == "early_exit":
                yield from (f"early_exit.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_module_has_its_place_in_the_order():
    assert set(ORDER) == set(SOURCES)
    shown = [line.split() for line in early_exit.__doc__.splitlines() if line.startswith("    ")]
    assert tuple(sum(shown, [])) == ORDER


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_only_from_below(name):
    own = [module.split(".")[1] for module in imports(SOURCES[name]) if "early_exit." in module]
    above = [module for module in own if module not in ORDER[: ORDER.index(name)]]
    assert above == []


@pytest.mark.parametrize("name", SOURCES)
def test_the_library_knows_no_front_door(name):
    tops = {module.partition(".")[0] for module in imports(SOURCES[name])}
    assert not tops & {"cifar10", "imagenet", "benchmarks", "tests"}


def test_the_package_itself_imports_nothing():
    assert list(imports(PACKAGE / "__init__.py")) == []


@pytest.mark.parametrize("name", SOURCES)
def test_the_library_names_no_data_set(name):
    # in code, that is, and in what people are told; docstrings may point at examples
    tree = ast.parse(SOURCES[name].read_text())
    prose = {
        id(node.value) for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    words = [
        node.value for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    with SOURCES[name].open("rb") as file:
        words += [t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.NAME]
    for data_set in ("cifar", "imagenet", "digits"):
        assert [word for word in words if data_set in word.lower()] == []


# What the libraries below do when they are imported is theirs, so they are imported first.
IMPORT_EVERYTHING = """
import importlib, os, sys
import argparse, hashlib, tempfile, zipfile, difflib, fcntl, signal, subprocess
import numpy, torch, tqdm, yaml
import torch.utils.flop_counter

def watch(event, args):
    if event == "open":
        path, mode, flags = args
        writing = (mode and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR)
        if writing:
            print("opened for writing:", path)
    elif event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove",
                           "os.system", "os.fork", "os.putenv", "urllib.", "tempfile.")):
        print(event, args)

before = torch.get_num_threads(), torch.initial_seed(), os.getcwd(), list(sys.argv)
sys.addaudithook(watch)
for name in sys.argv[1:]:
    importlib.import_module(name)
after = torch.get_num_threads(), torch.initial_seed(), os.getcwd(), list(sys.argv)
if before != after:
    print("changed:", before, after)
if torch.cuda.is_initialized():
    print("a device was chosen")
for name in ("torchvision", "matplotlib", "sklearn", "tensorboard"):
    if name in sys.modules:
        print("imported:", name)
"""


@pytest.mark.slow
def test_importing_does_nothing(tmp_path):
    modules = [f"early_exit.{name}" for name in SOURCES] + ["cifar10.resnet", "cifar10.data"]
    modules += ["cifar10.trainer", "cifar10.eval"]
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_EVERYTHING, *modules],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


# Thresholds, temperatures and every other choice come from val.


def test_choosing_is_given_val_alone():
    assert list(inspect.signature(choose).parameters) == ["val", "goal", "cost", "times"]


@pytest.fixture
def halves(stored):
    """The first half of the stored images as val, the second as test."""
    rows = np.arange(2048)
    return (
        stored.subset(rows[:1024], "val", "first half"),
        stored.subset(rows[1024:], "test", "second half"),
    )


GOALS = [
    Goal(max_drop=0.01),
    Goal(budget=0.9, criterion="entropy"),
    Goal(max_drop=0.02, criterion="patience", calibrate=False),
    Goal(risk=0.2, confidence=0.8, per_exit=True),
]


@pytest.fixture
def policy_of(tiny_net, tmp_path, monkeypatch):
    """The policy that an evaluation writes, given the records of val and test."""

    def policy_of(val, test, goal):
        trained = Trained(
            run_dir=tmp_path, config=Config(), network=tiny_net, data=None,
            cost=network_cost(tiny_net), device=torch.device("cpu"), precision="off",
            weights="some weights", unseen_val="hash", val_hash="hash", classes=tuple("abcd"),
            normalisation={},
        )
        data = type("Data", (), {"name": "wallpapers", "classes": tuple("abcd")})()
        monkeypatch.setattr(evaluation, "load_run", lambda *_: trained)
        monkeypatch.setattr(evaluation, "val_and_test", lambda *_: (val, test, data, "held out"))
        door = FrontDoor(build_network=None, load_data=None)
        _, directory = evaluate(tmp_path, door, goal, overrides={}, live=False, draw=False)
        return Policy.load(directory / "policy.yaml")

    return policy_of


def relabelled(record):
    """The record with other targets: those of the images in another order."""
    order = np.random.default_rng(0).permutation(len(record))
    return type(record)(record.logits, record.targets[order], record.info)


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_no_policy_depends_on_tests_targets(policy_of, halves, goal):
    val, test = halves
    chosen = policy_of(val, test, goal)
    assert policy_of(val, relabelled(test), goal) == chosen


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_no_policy_depends_on_tests_images(policy_of, halves, goal):
    val, test = halves
    other = type(test)(np.flip(test.logits, axis=0).copy(), test.targets, test.info)
    assert policy_of(val, other.subset(np.arange(500), "test", "some"), goal) == policy_of(
        val, test, goal
    )


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_policies_do_depend_on_vals_targets(policy_of, halves, goal):
    val, test = halves
    assert policy_of(relabelled(val), test, goal) != policy_of(val, test, goal)


def test_the_label_decides_no_exit(tiny_net, halves):
    val, test = halves
    policy = choose(val, Goal(max_drop=0.01), network_cost(tiny_net))
    taken = replay(test, policy).exit_index
    assert np.array_equal(replay(relabelled(test), policy).exit_index, taken)
    assert len(set(taken.tolist())) > 1
