"""benchmarks/peers.py compares answers before it times, and refuses mistakes in one line.

earlyon itself is not needed: a small package with the same calls takes its place.
"""

import argparse
import re
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, finish, run_main, start

from benchmarks import peer_job, peer_sides, peers
from early_exit.errors import UserError

# The calls of earlyon that the benchmark makes. SHIFT is added to every threshold.
STAND_IN = """
from types import SimpleNamespace
import torch

__version__ = "stand-in"
EarlyExitConfig = ExitPoint = None


def point(name, layer_name, in_channels):
    return SimpleNamespace(name=name, layer_name=layer_name)


class Wrapper:
    def __init__(self, backbone, heads, classifier, config, input_shape):
        self.backbone, self.heads, self.config = backbone.eval(), heads, config

    def eval(self):
        return self

    def route(self, x):
        seen = {}
        points = self.config.exit_points
        hooks = [
            self.backbone.get_submodule(point.layer_name).register_forward_hook(
                lambda module, inputs, output, name=point.name: seen.setdefault(name, output)
            )
            for point in points
        ]
        with torch.inference_mode():
            final = self.backbone(x)
            [hook.remove() for hook in hooks]
            for index, point in enumerate(points):
                logits = self.heads[point.name](seen[point.name])
                threshold = self.config.confidence_thresholds[index] + SHIFT
                if (logits.softmax(-1).amax(-1) >= threshold).all():
                    return index, logits
        return -1, final

    def __call__(self, x):
        exit_taken, logits = self.route(x)
        assert len(x) == 1
        return SimpleNamespace(exit_taken=exit_taken, prediction=logits)

    infer = __call__

    def forward_inference_batched(self, x):
        exit_taken, logits = self.route(x)
        return SimpleNamespace(exit_taken=exit_taken, predictions=logits)


EarlyExitConfig, ExitPoint, EarlyExitWrapper = SimpleNamespace, point, Wrapper
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs benchmarks/peers.py: exit code, stdout, stderr."""
    return lambda *flags: run_main(peers.main, "peers.py", monkeypatch, capsys, *flags)


@pytest.fixture
def job(tmp_path):
    """The directory of a job of 16 images, and its reference."""
    directory = tmp_path / "job"
    directory.mkdir()
    args = argparse.Namespace(
        arch="resnet20",
        exits=["layer2.0", "layer3.0"],
        head="conv",
        images=16,
        exit_shares=[0.25, 0.5],
        runtimes=["torch"],
        threads=torch.get_num_threads(),
    )
    return directory, peer_job.write_job(args, directory)


def write_stand_in(directory, shift=0.0):
    """earlyon's stand-in, as a package in a directory."""
    package = directory / "earlyon"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN.replace("SHIFT", str(shift)))
    (package / "staged.py").write_text("staged_model = lambda wrapper: wrapper\n")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """earlyon's stand-in, importable."""
    write_stand_in(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("earlyon", "earlyon.staged"):
        sys.modules.pop(name, None)


def answers(side, name, batch_size):
    exits, classes = side.answers(name, batch_size)
    return np.array(exits) % 3, np.array(classes)


def test_the_wanted_shares_of_the_job_exit(job):
    assert job[1].shares.tolist() == [0.25, 0.5, 0.25]


def test_both_sides_give_the_answers_of_the_logits(job, stand_in):
    directory, reference = job
    theirs, ours = peer_sides.earlyon_side(directory), peer_sides.our_side(directory)
    for side, name, batch_size, group in (
        (theirs, "hooks", 1, 1),
        (theirs, "staged", 1, 1),
        (theirs, "batched", 4, 4),
        (ours, "torch", 1, 1),
        (ours, "torch", 5, 1),
    ):
        exits, classes = answers(side, name, batch_size)
        assert len(exits) == 16 // batch_size * batch_size
        reference.check(name, exits, classes, group)


SCORES = [[0.9, 0.2], [0.6, 0.9], [0.4, 0.3], [0.7, 0.8]]
REFERENCE = peer_job.Reference(
    ("a", "b", "final"),
    np.tile(np.eye(4)[:, None], (1, 3, 1)),  # image i is of class i at every exit
    np.pad(SCORES, ((0, 0), (0, 1))),
    (0.7, 0.5),
)
CLASSES = np.arange(4)


def test_the_first_exit_that_is_sure_enough_is_expected():
    assert REFERENCE.check("x", np.array([0, 1, 2, 0]), CLASSES, group=1) == 0


def test_a_batch_is_expected_to_exit_where_its_least_sure_image_is_sure():
    # of images 0 and 1 the least sure scores are 0.6 and 0.2, of 2 and 3 they are 0.4 and 0.3
    assert REFERENCE.check("x", np.array([2, 2, 2, 2]), CLASSES, group=2) == 0
    # of all but image 2 alone in its batch
    with pytest.raises(UserError, match="4"):
        REFERENCE.check("x", np.array([0, 0, 0, 0]), CLASSES, group=2)


@pytest.mark.parametrize(
    ("exits", "classes"), [([0, 1, 2, 1], [0, 1, 2, 3]), ([0, 1, 2, 0], [0, 1, 3, 3])]
)
def test_another_exit_or_class_is_refused(exits, classes):
    score = REFERENCE.scores.copy()
    score[3, 0] = 0.71
    reference = peer_job.Reference(
        REFERENCE.exit_names, REFERENCE.logits, score, REFERENCE.thresholds
    )
    with pytest.raises(UserError, match="hooks"):
        reference.check("hooks", np.array(exits), np.array(classes), group=1)


def test_another_exit_within_rounding_is_counted():
    # the score of image 3 at the first exit is the threshold
    assert REFERENCE.check("x", np.array([0, 1, 2, 1]), CLASSES, group=1) == 1


def test_a_row_names_the_fastest_mode_and_ratios_of_turns():
    times = peers.Times(
        64, {"slow": [0.4, 0.4, 0.4], "fast": [0.2, 0.3, 0.1]}, {"torch": [0.1, 0.1, 0.1]}
    )
    assert times.row() == "| 64 | 200.00 (fast) | 100.00 | 2.00 (1.00 to 3.00) |"


def test_without_earlyon_one_line_says_how_to_make_an_environment(run, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("peers.py: ") and err.count("\n") == 1
    assert "pip install earlyon" in err and "--peer-python" in err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--exit-shares", "0.5"), "--exit-shares"),
        (("--exit-shares", "0.6", "0.6"), "--exit-shares"),
        (("--images", "100"), "--batch-sizes"),
        (("--turns", "0"), "--turns"),
        (("--runtimes", "tensorrt"), "tensorrt"),
        (("--exits", "layr1", "layer2.0"), "layr1"),
    ],
)
def test_mistakes_end_in_one_line(run, flags, named):
    code, _, err = run("--peer-python", sys.executable, *flags)
    assert code == 2
    assert err.startswith("peers.py: ") and err.count("\n") == 1
    assert named in err


def test_a_python_that_does_not_exist_ends_in_one_line(run, tmp_path):
    flags = ("--arch", "resnet20", "--images", "4", "--batch-sizes", "1")
    code, _, err = run("--peer-python", tmp_path / "none", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert str(tmp_path / "none") in err


def python_with_stand_in(directory, shift):
    """A Python that finds the stand-in."""
    write_stand_in(directory, shift)
    python = directory / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{directory}" exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    return python


def run_script(tmp_path, shift):
    flags = "--arch resnet20 --images 16 --batch-sizes 1 8 --runtimes torch --turns 1 --starts 1"
    python = python_with_stand_in(tmp_path, shift)
    script = ROOT / "benchmarks/peers.py"
    return finish(start(script, "--peer-python", python, *flags.split(), cwd=tmp_path))


@pytest.mark.slow
def test_the_processes_are_compared_and_timed(tmp_path):
    done = run_script(tmp_path, shift=0.0)
    assert (done.returncode, done.stderr) == (0, "")
    assert "earlyon stand-in" in done.stdout and "layer3.0 " in done.stdout
    rows = re.findall(r"^\| (\d+) \| [\d.]+ \((\w+)\) \| [\d.]+ \| ([\d.]+) ", done.stdout, re.M)
    assert [(size, mode) for size, mode, _ in rows][1] == ("8", "batched")
    assert rows[0][0] == "1" and rows[0][1] in ("hooks", "staged")


@pytest.mark.slow
def test_nothing_is_timed_if_the_answers_differ(tmp_path):
    done = run_script(tmp_path, shift=1.0)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("peers.py: hooks ") and done.stderr.count("\n") == 1
