"""A user's own policy: taken whole by an evaluation, and refused for other exits."""

import dataclasses

import numpy as np
from helpers import CPU, TASK, quick_report, refusal, replay

from early_exit.choosing.choice import choose
from early_exit.choosing.goals import FixedPolicy
from early_exit.choosing.record import ExitRecord, score_record
from early_exit.evaluation.evaluate import evaluate
from early_exit.inference.policy import Policy

OWN = Policy(
    exit_names=("layer1", "layer2", "final"),
    thresholds=(-0.4, -1.5),
    criterion="entropy",
    temperatures=(2.0, 1.5, 1.0),
    enabled=(True, False),
    guarantee={"risk": 0.1},
)


def test_it_is_taken_whole_without_its_guarantee(evaluated_run):
    val = ExitRecord.load(evaluated_run / "records" / "val-off")
    chosen = choose(val, FixedPolicy(OWN), val.cost)
    assert chosen == dataclasses.replace(OWN, guarantee=None)


def test_the_report_says_that_nothing_was_fitted(run_copy):
    _, directory = evaluate(
        str(run_copy), TASK, FixedPolicy(OWN), overrides=CPU, live=False, draw=False
    )
    page = (directory / "report.md").read_text()
    assert directory.name == "given-policy-entropy"
    assert Policy.load(str(directory / "policy.yaml")).temperatures == (2.0, 1.5, 1.0)
    assert Policy.load(directory / "policy.yaml").thresholds == OWN.thresholds
    assert "given" in page and "60 images" in page and "entropy" in page


def test_numbers_of_numpy_are_numbers(tmp_path):
    policy = Policy(
        exit_names=["a", "b", "final"],
        thresholds=np.array([0.25, 0.5]),
        temperatures=np.float32([1, 2, 3]),
        enabled=np.array([True, False]),
    )
    policy.save(tmp_path / "policy.yaml")
    assert Policy.load(tmp_path / "policy.yaml") == policy
    assert policy == Policy(
        exit_names=("a", "b", "final"),
        thresholds=(0.25, 0.5),
        temperatures=(1.0, 2.0, 3.0),
        enabled=(True, False),
    )
    assert policy.with_threshold(np.float32(0.5)).thresholds == (0.5, 0.5)


def test_other_exits(run_copy):
    other = Policy(exit_names=("layer1", "final"), thresholds=(0.5,))
    message = refusal(quick_report, run_copy, goal=FixedPolicy(other))
    assert "layer1, final" in message and "layer1, layer2, final" in message


def test_another_policys_exits_are_refused(stored):
    policy = Policy(exit_names=("a", "b", "c", "final"), thresholds=(0.5,) * 3)
    for call in (replay, score_record):
        message = refusal(call, stored, policy)
        assert "a, b, c, final" in message and "stem, layer1, layer2, final" in message
