"""How the code fits together: imports point down, importing does nothing, and nothing is ever
chosen on test."""

import ast
import graphlib
import inspect
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, in_torch, replay

from early_exit.choosing.choice import choose
from early_exit.choosing.goals import Budget, MaxDrop, Risk
from early_exit.config import Config
from early_exit.evaluation import evaluate as evaluation
from early_exit.evaluation.evaluate import evaluate
from early_exit.inference.policy import Policy
from early_exit.model.cost import network_cost
from early_exit.task import Task
from early_exit.trained import Splits, Trained

LIBRARY = "early_exit"
# From the ground up. A file imports only from its own package and from lines above its own.
HOUSE = (
    ("errors", "metrics"),
    ("system",),
    ("model",),
    ("config",),
    ("inference",),
    ("data",),
    ("manifest", "prediction"),
    ("deployed",),
    ("serving",),
    ("choosing",),
    ("task",),
    ("training",),
    ("output",),
    ("trained",),
    ("evaluation",),
    ("classifier",),
    ("loading", "export_onnx", "card", "front_matter"),
    ("cli",),
    ("predict", "compare", "export", "serve"),
)
LINES = {name: line for line, names in enumerate(HOUSE) for name in names}
# Tables that may name data sets: the module, and the name they are assigned to.
TABLES = {"task": "TASKS", "evaluation.upgrade": "OLD_TASKS"}

Sources = dict[str, str]
"""The text of each module of the library by its dotted name, as in `model.network`; that of a
package's `__init__.py` by the package's name."""


def read_sources() -> Sources:
    """The library without its own `__init__.py`, which only names what is imported when asked
    for."""
    sources = {}
    for path in sorted((ROOT / LIBRARY).rglob("*.py")):
        parts = path.relative_to(ROOT / LIBRARY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            sources[name] = path.read_text()
    return sources


SOURCES = read_sources()


def imported(text: str) -> Iterator[str]:
    """Every dotted name that a text imports: at its top, in a function, or for types alone."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(text: str, sources: Sources) -> set[str]:
    """The modules of the library that a text imports."""
    found = set()
    for name in imported(text):
        top, _, inner = name.partition(".")
        if top != LIBRARY or not inner:
            continue
        while inner and inner not in sources:  # a name in a module
            inner = inner.rpartition(".")[0]
        found.add(inner)  # "" is the library's own __init__.py
    return found


def package_of(module: str) -> str:
    """The package or single module on a line of the house."""
    return module.partition(".")[0]


def upward(sources: Sources) -> list[str]:
    """Imports of another package or module that is not on a line above."""
    return [
        f"{name} imports {other or LIBRARY}"
        for name, text in sources.items()
        for other in sorted(own_imports(text, sources))
        if not other
        or (
            package_of(other) != package_of(name)
            and LINES[package_of(other)] >= LINES[package_of(name)]
        )
    ]


def cycle(sources: Sources) -> list[str]:
    """A cycle of imports, if there is one."""
    graph = {name: own_imports(text, sources) for name, text in sources.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def data_sets(name: str, text: str) -> list[str]:
    """The names and strings of a module that name a data set. Docstrings may name examples, and so
    may the tables of tasks."""
    tree = ast.parse(text)
    allowed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            allowed.add(id(node.value))
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if TABLES.get(name) in {getattr(target, "id", None) for target in targets}:
            allowed |= {id(part) for part in ast.walk(node.value)}
    words = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if id(node) not in allowed
    ]
    tokens = tokenize.tokenize(BytesIO(text.encode()).readline)
    words += [token.string for token in tokens if token.type == tokenize.NAME]
    return [
        word
        for word in words
        if any(data_set in word.lower() for data_set in ("cifar", "imagenet", "digits"))
    ]


def test_every_module_has_its_line():
    assert {package_of(name) for name in SOURCES} == set(LINES)


def test_a_module_imports_only_from_its_package_and_from_below():
    assert upward(SOURCES) == []


def test_no_import_goes_in_a_circle():
    assert cycle(SOURCES) == []


@pytest.mark.parametrize("name", SOURCES)
def test_the_library_knows_no_script(name):
    tops = {module.partition(".")[0] for module in imported(SOURCES[name])}
    assert not tops & {"cifar10", "imagenet", "benchmarks", "tests", "helpers"}


@pytest.mark.parametrize("name", SOURCES)
def test_the_library_names_no_data_set(name):
    assert data_sets(name, SOURCES[name]) == []


def planted(name: str, line: str) -> Sources:
    """The library with another line at the end of a module."""
    return {**SOURCES, name: f"{SOURCES[name]}\n{line}\n"}


class TestPlanted:
    """What is forbidden is found."""

    @pytest.mark.parametrize(
        ("name", "line", "found"),
        [
            ("model.cost", "from early_exit.inference import policy", "inference.policy"),
            ("model.cost", "from early_exit.config import Config", "config"),
            ("model.cost", "import early_exit.task", "task"),
            ("metrics", "from early_exit.errors import UserError", "errors"),
            ("predict", "def load():\n    from early_exit import export", "export"),
            (
                "system.files",
                "if TYPE_CHECKING:\n    from early_exit.trained import Splits",
                "trained",
            ),
            ("choosing.goals", "from early_exit import evaluate", LIBRARY),
        ],
    )
    def test_an_import_that_points_up(self, name, line, found):
        assert upward(planted(name, line)) == [f"{name} imports {found}"]

    def test_an_import_from_the_own_package_is_none(self):
        line = "from early_exit.choosing.outcome import Point"
        assert upward(planted("choosing.goals", line)) == []

    @pytest.mark.parametrize("line", ["{}", "if TYPE_CHECKING:\n    {}", "def later():\n    {}"])
    def test_a_cycle(self, line):
        statement = "from early_exit.choosing.choice import choose"  # which imports the search
        found = cycle(planted("choosing.search", line.format(statement)))
        assert {"choosing.choice", "choosing.search"} <= set(found)

    @pytest.mark.parametrize(
        "line", ["digits = 10", "MEAN = {'CIFAR-10': 0.5}", "def load_imagenet():\n    pass"]
    )
    @pytest.mark.parametrize("name", ["model.network", "task"])
    def test_a_data_set(self, name, line):
        assert data_sets(name, planted(name, line)[name]) != []

    def test_a_table_elsewhere(self):
        assert data_sets("config", "TASKS = {'mine': 'cifar10.trainer:TASK'}") != []

    def test_a_docstring_is_none(self):
        assert (
            data_sets("config", '"""As on CIFAR-10."""\nRATE = 0.1\n"""As on ImageNet."""\n') == []
        )


# Other libraries are imported first: what they do then is not looked at.
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


# class folders are decoded by torchvision, which is imported first for these
WITH_TORCHVISION = ("data.class_folders", "data.folders", "data.sources", "data.workers")


def importing(directory: Path, *modules: str, first: str = "import sys") -> str:
    """What importing the modules does, if it does anything."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", f"{first}\n{IMPORT_EVERYTHING}", *modules],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(directory.iterdir()) == []
    return done.stdout


@pytest.mark.slow
def test_importing_does_nothing(tmp_path):
    scripts = ["cifar10.resnet", "cifar10.data", "cifar10.trainer", "cifar10.eval"]
    names = [f"{LIBRARY}.{name}" for name in SOURCES if name not in WITH_TORCHVISION]
    assert importing(tmp_path, LIBRARY, *names, *scripts) == ""


@pytest.mark.slow
def test_importing_what_needs_torchvision_does_nothing_else(tmp_path):
    names = [f"{LIBRARY}.{name}" for name in WITH_TORCHVISION]
    first = "import torchvision.datasets, torchvision.transforms.v2"
    assert importing(tmp_path, *names, "imagenet.main", first=first) == "imported: torchvision\n"


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
    MaxDrop(0.01),
    Budget(0.9, criterion="entropy"),
    MaxDrop(0.02, criterion="patience", calibrate=False),
    Risk(0.2, confidence=0.8),
]


@pytest.fixture
def policy_of(tiny_net, images, tmp_path, monkeypatch):
    """The policy that an evaluation writes, given the records of val and test."""

    def policy_of(val, test, goal):
        trained = Trained(
            run_dir=tmp_path,
            config=Config(),
            network=tiny_net,
            data=None,
            cost=network_cost(tiny_net),
            runtime=in_torch(tiny_net, images[:2]),
            device=torch.device("cpu"),
            precision="off",
            weights="some weights",
            unseen_val="hash",
            val_hash="hash",
            classes=tuple("abcd"),
            normalisation={},
        )
        data = type("Data", (), {"name": "wallpapers", "classes": tuple("abcd")})()
        monkeypatch.setattr(evaluation, "load_run", lambda *_, **__: trained)
        splits = Splits(val, test, data, "held out")
        monkeypatch.setattr(evaluation, "get_splits", lambda *_: splits)
        task = Task(build_network=None, load_data=None)
        _, directory = evaluate(tmp_path, task, goal, overrides={}, live=False, draw=False)
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
    policy = choose(val, MaxDrop(0.01), network_cost(tiny_net))
    exit_index = replay(test, policy).exit_index
    assert np.array_equal(replay(relabelled(test), policy).exit_index, exit_index)
    assert len(set(exit_index.tolist())) > 1
