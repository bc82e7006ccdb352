"""Evaluation: what is chosen on val, what is reported on test, and what is refused."""

import dataclasses
import itertools
import json
import logging
import math
import re
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from claims import assert_names, require_precision
from scripts import CPU, few_digits, run_main, tiny_network, tiny_run

from cifar10 import data
from cifar10 import eval as script
from early_exit import checkpoint, energy, evaluation, guarantees, plots
from early_exit import trained as trained_run
from early_exit.choosing import Goal, choose
from early_exit.config import Config, DataConfig, ModelConfig, OptimConfig
from early_exit.cost import Cost, network_cost
from early_exit.criteria import CRITERIA
from early_exit.errors import UserError
from early_exit.evaluation import evaluate
from early_exit.experiment import FrontDoor
from early_exit.inference import infer
from early_exit.latency import StageTimes
from early_exit.policy import Policy
from early_exit.records import ExitRecord, score_record
from early_exit.report import Picture

FLAGS = ("--device", "cpu", "--threads", "1", "--no-live", "--no-plots")
NAMES = ("layer1", "layer2", "final")


def some_digits(settings: DataConfig) -> data.Data:
    """320 train, 100 val and 120 test images."""
    return few_digits(settings.split_seed, 320, 100, 120)


DOOR = FrontDoor(tiny_network, some_digits)


def trained(directory: Path, split_seed: int = 0, epochs: int = 8, **settings) -> Path:
    """A run in `directory`; settings: exits, backbone, regime."""
    optim = OptimConfig(epochs=epochs, batch_size=16, lr=0.05, schedule="cosine")
    return tiny_run(directory, DOOR, optim, split_seed, **settings)


def made_by_hand(targets: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """Logits of three exits, (images, 3, 10), the same on every machine: noise of which the exits
    share a part, and the later the exit and the easier the image, the more of the target."""
    generator, rows = np.random.default_rng(seed), np.arange(len(targets))
    shared, own = (
        generator.integers(-1000, 1001, (len(targets), exits, 10)) / 1000 for exits in (1, 3)
    )
    ease = generator.integers(0, 1001, len(targets)) / 1000
    logits = 2 * shared + 2 * own
    for index, strength in enumerate((4.0, 6.0, 8.0)):
        logits[rows, index, targets] += strength * ease
    return logits.astype(np.float32)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A joint run with two early exits, already recorded. Not to be changed."""
    directory = trained(tmp_path_factory.mktemp("real") / "run")
    evaluate(directory, DOOR, Goal(max_drop=0.0), overrides=CPU, live=False, draw=False)
    shutil.rmtree(directory / "eval")
    return directory


@pytest.fixture(scope="module")
def finished(real, tmp_path_factory) -> Path:
    """That run with records made by hand, so that what is chosen on them does not depend on how a
    processor rounds in training. Not to be changed."""
    directory = shutil.copytree(real, tmp_path_factory.mktemp("finished") / "run")
    # with this seed, no two scores are as close as float32 may round (TestRows has a test of it)
    for split, seed in (("val", (176, 3)), ("test", (176, 4))):
        place = directory / "records" / f"{split}-off"
        record = ExitRecord.load(place)
        logits = made_by_hand(record.targets, seed)
        dataclasses.replace(record, logits=logits).save(place)
    return directory


@pytest.fixture(scope="module")
def one_exit(tmp_path_factory) -> Path:
    """A joint run with one early exit. Not to be changed."""
    return trained(tmp_path_factory.mktemp("one") / "run", epochs=1, exits=("layer1",))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run of the plain network. Not to be changed."""
    return trained(tmp_path_factory.mktemp("plain") / "run", epochs=1, exits=())


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of `finished`, to be evaluated and changed."""
    return shutil.copytree(finished, tmp_path / "run")


def quickly(directory: Path, goal: Goal, **options) -> tuple[dict, dict]:
    """The report and the policy of an evaluation without clock and pictures, as written."""
    options = {"overrides": CPU, "live": False, "draw": False, **options}
    _, written = evaluate(directory, DOOR, goal, **options)
    report = json.loads((written / "report.json").read_text())
    return report, yaml.safe_load((written / "policy.yaml").read_text())


# The obvious way to do it, image after image, in plain Python.

CLOSE = 1e-6  # a threshold is a float32 score: some epsilons off this one's float64


def stored(directory: Path, split: str) -> tuple[list, list]:
    """Logits (images, exits, classes) and targets of a record, as lists."""
    where = directory / "records" / f"{split}-off"
    return np.load(where / "logits.npy").tolist(), np.load(where / "targets.npy").tolist()


def probabilities(logits: list[float], temperature: float) -> list[float]:
    """Softmax of one image's logits at one exit."""
    powers = [math.exp((value - max(logits)) / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def slow_scores(exits: list[list[float]], criterion: str, temperatures: list[float]) -> list[float]:
    """The score of one image at each exit."""
    scores, answers = [], []
    for logits, temperature in zip(exits, temperatures, strict=True):
        probs = probabilities(logits, temperature)
        ranked = sorted(probs, reverse=True)
        answers.append(logits.index(max(logits)))
        if criterion == "max_prob":
            scores.append(ranked[0])
        elif criterion == "margin":
            scores.append(ranked[0] - ranked[1])
        elif criterion == "entropy":
            scores.append(sum(p * math.log(p) for p in probs if p > 0))
        else:
            agree = 0
            while agree + 1 < len(answers) and answers[-1] == answers[-2 - agree]:
                agree += 1
            scores.append(agree)
    return scores


def slow_exit(
    scores: list[float], thresholds: list[float], enabled: Sequence[bool] = (True, True)
) -> int:
    """The exit that one image takes."""
    for index, threshold in enumerate(thresholds):
        if enabled[index] and scores[index] >= threshold - CLOSE:
            return index
    return len(thresholds)


# 16x16 images, one block a stage of widths 16, 32, 64; heads: a 3x3 convolution of stride 2
STEM_AND_LAYER1 = 3 * 16 * 9 * 16**2 + 2 * 16 * 16 * 9 * 16**2
LAYER2 = 16 * 32 * 9 * 8**2 + 32 * 32 * 9 * 8**2
LAYER3 = 32 * 64 * 9 * 4**2 + 64 * 64 * 9 * 4**2 + 64 * 10
HEADS = (16 * 16 * 9 * 8**2 + 16 * 10, 32 * 32 * 9 * 4**2 + 32 * 10)
PLAIN = STEM_AND_LAYER1 + LAYER2 + LAYER3
MACS = (
    STEM_AND_LAYER1 + HEADS[0],
    STEM_AND_LAYER1 + LAYER2 + sum(HEADS),
    PLAIN + sum(HEADS),
)


def macs_with(enabled: Sequence[bool]) -> list[int]:
    """What an image costs that leaves at each exit, if some heads are off."""
    off = [head * (not on) for head, on in zip(HEADS, enabled, strict=True)]
    return [whole - sum(off[: index + 1]) for index, whole in enumerate(MACS)]


def slow_outcome(directory: Path, split: str, policy: dict) -> dict:
    """Accuracy, mean share of MACs, and the exit and rightness of every image."""
    taken, right = [], []
    for exits, target in zip(*stored(directory, split), strict=True):
        scores = slow_scores(exits, policy["criterion"], policy["temperatures"])
        index = slow_exit(scores, policy["thresholds"], policy["enabled"])
        taken.append(index)
        right.append(exits[index].index(max(exits[index])) == target)
    macs = macs_with(policy["enabled"])
    return {
        "taken": taken,
        "right": right,
        "accuracy": sum(right) / len(right),
        "macs_share": sum(macs[index] for index in taken) / len(taken) / PLAIN,
    }


GOALS = {
    "drop 0": Goal(max_drop=0.0),
    "drop 5": Goal(max_drop=0.05),
    "budget 70": Goal(budget=0.7),
    "one threshold": Goal(thresholds=(0.6,)),
    "a threshold each": Goal(thresholds=(0.9, 0.3)),
    "uncalibrated": Goal(max_drop=0.02, calibrate=False),
    "entropy": Goal(max_drop=0.02, criterion="entropy"),
    "margin": Goal(budget=0.8, criterion="margin"),
    "patience": Goal(thresholds=(1,), criterion="patience"),
    "a guarantee": Goal(risk=0.15, confidence=0.9),
    "a guarantee, each": Goal(risk=0.15, confidence=0.9, per_exit=True),
    "delta": Goal(delta=0.6, calibrate=False),
    "delta, and a gain to exceed": Goal(delta=0.6, epsilon=0.3, calibrate=False),
    "a threshold for each, chosen": Goal(max_drop=0.03, per_exit=True),
    "a budget, each": Goal(budget=0.75, per_exit=True),
}


class TestNumbers:
    """The report against a slow recomputation from the records."""

    @pytest.fixture(scope="class", params=GOALS)
    @classmethod
    def found(cls, request, finished, tmp_path_factory):
        """Report, policy, and what the policy does on test, slowly."""
        directory = shutil.copytree(finished, tmp_path_factory.mktemp("numbers") / "run")
        report, policy = quickly(directory, GOALS[request.param])
        return report, policy, slow_outcome(directory, "test", policy)

    def test_accuracy_on_test(self, found):
        report, _, slow = found
        assert report["test"]["accuracy"] == pytest.approx(slow["accuracy"])

    def test_multiply_adds_on_test(self, found):
        report, _, slow = found
        assert report["test"]["macs_share"] == pytest.approx(slow["macs_share"])

    def test_shares_of_the_exits(self, found):
        report, _, slow = found
        taken = [row["taken"] for row in report["exits"]]
        assert sum(taken) == pytest.approx(1)
        assert taken == pytest.approx([slow["taken"].count(index) / 120 for index in range(3)])

    def test_accuracy_of_those_who_leave_at_each_exit(self, found):
        report, _, slow = found
        for index, row in enumerate(report["exits"]):
            here = [r for r, t in zip(slow["right"], slow["taken"], strict=True) if t == index]
            expected = sum(here) / len(here) if here else None
            assert row["taken_accuracy"] == pytest.approx(expected)

    def test_lot_of_as_many_at_each_exit(self, found):
        report, _, slow = found
        alone = [row["accuracy"] for row in report["exits"]]
        expected = sum(slow["taken"].count(i) / 120 * value for i, value in enumerate(alone))
        assert report["random_accuracy"] == pytest.approx(expected)

    def test_thresholds_and_temperatures_are_the_policys(self, found):
        report, policy, _ = found
        thresholds = [row["threshold"] for row in report["exits"]]
        assert thresholds[-1] is None
        assert [math.inf if t is None else t for t in thresholds[:-1]] == policy["thresholds"]
        assert [row["temperature"] for row in report["exits"]] == policy["temperatures"]


class TestRows:
    """What the report says of each exit, whatever the goal."""

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, finished, tmp_path_factory) -> tuple[Path, list[dict], dict]:
        directory = shutil.copytree(finished, tmp_path_factory.mktemp("rows") / "run")
        report, _ = quickly(directory, Goal(thresholds=(0.8,)))
        return directory, report["exits"], report

    def test_names(self, rows):
        assert [row["name"] for row in rows[1]] == list(NAMES)

    def test_multiply_adds_of_each_exit_are_those_counted_by_hand(self, rows):
        assert [row["macs"] for row in rows[1]] == list(MACS)
        assert rows[2]["plain_macs"] == PLAIN
        assert [row["macs_share"] for row in rows[1]] == pytest.approx([m / PLAIN for m in MACS])
        assert [row["head_share"] for row in rows[1]] == pytest.approx(
            [HEADS[0] / PLAIN, HEADS[1] / PLAIN, 0.0]
        )

    @pytest.mark.parametrize(("split", "key"), [("val", "accuracy_val"), ("test", "accuracy")])
    def test_accuracy_of_each_exit_alone(self, rows, split, key):
        directory, exits, _ = rows
        logits, targets = stored(directory, split)
        for index, row in enumerate(exits):
            right = sum(
                image[index].index(max(image[index])) == target
                for image, target in zip(logits, targets, strict=True)
            )
            assert row[key] == pytest.approx(right / len(targets))

    def test_scores_rank_whom_going_on_would_help(self, rows):
        directory, exits, _ = rows
        policy = yaml.safe_load(next((directory / "eval").glob("*/policy.yaml")).read_text())
        pairs = list(zip(*stored(directory, "test"), strict=True))
        for index, row in enumerate(exits[:-1]):
            scores = [slow_scores(e, "max_prob", policy["temperatures"])[index] for e, _ in pairs]
            helped = [
                e[-1].index(max(e[-1])) == target != e[index].index(max(e[index]))
                for e, target in pairs
            ]
            lower = [
                (a < b) + (a == b) / 2
                for a, one in zip(scores, helped, strict=True) if one
                for b, other in zip(scores, helped, strict=True) if not other
            ]
            assert row["gain_auroc"] == pytest.approx(sum(lower) / len(lower), abs=1e-6)
        assert exits[-1]["gain_auroc"] is None

    def test_classes_by_hand(self, rows):
        directory, _, report = rows
        policy = yaml.safe_load(next((directory / "eval").glob("*/policy.yaml")).read_text())
        slow, targets = slow_outcome(directory, "test", policy), stored(directory, "test")[1]
        assert [row["name"] for row in report["classes"]] == [str(digit) for digit in range(10)]
        for digit, row in enumerate(report["classes"]):
            here = [index for index, target in enumerate(targets) if target == digit]
            macs = [MACS[slow["taken"][index]] / PLAIN for index in here]
            assert row["images"] == len(here)
            assert row["accuracy"] == pytest.approx(
                sum(slow["right"][index] for index in here) / len(here)
            )
            assert row["macs_share"] == pytest.approx(sum(macs) / len(macs))

    def test_energy_is_that_of_the_exits_taken(self, rows):
        directory, exits, report = rows
        network = tiny_network(Config(model=ModelConfig(exits=NAMES[:-1])), 10)
        taken = [row["taken"] for row in exits]
        assert [row["weights"] for row in report["energy"]] == ["SRAM", "DRAM"]
        for row in report["energy"]:
            found = energy.estimate(network, network_cost(network))[row["weights"]]
            assert row["plain"] == pytest.approx(found.plain)
            assert row["test"] == pytest.approx(np.dot(taken, found.cumulative()))

    def test_overthinking_is_that_of_the_record(self, rows):
        directory, _, report = rows
        answers = [
            [one.index(max(one)) == target for one in image]
            for image, target in zip(*stored(directory, "test"), strict=True)
        ]
        destructive = sum(any(right[:-1]) and not right[-1] for right in answers)
        wasteful = sum(any(right[:-1]) and right[-1] for right in answers)
        assert report["overthinking"]["destructive"] == pytest.approx(destructive / 120)
        assert report["overthinking"]["wasteful"] == pytest.approx(wasteful / 120)

    def test_final_accuracy_is_the_last_exits(self, rows):
        assert rows[2]["final_accuracy"] == rows[1][-1]["accuracy"]

    def test_the_records_are_good_enough_to_test_with(self, rows):
        directory, exits, _ = rows
        accuracy = [row["accuracy"] for row in exits]
        assert accuracy[0] < accuracy[-1]
        assert accuracy[-1] > 0.5
        images = [image for split in ("val", "test") for image in stored(directory, split)[0]]
        for temperatures in ([1.0] * 3, [row["temperature"] for row in exits]):
            for criterion in ("max_prob", "margin", "entropy"):
                scores = [slow_scores(image, criterion, temperatures)[:-1] for image in images]
                assert np.diff(np.unique(scores)).min() > 2 * CLOSE

    def test_the_curve_ends_at_the_final_exit_and_at_the_first(self, rows):
        _, exits, report = rows
        first, last = report["curve"][0], report["curve"][-1]
        assert first["threshold"] is None
        assert first["test"]["accuracy"] == pytest.approx(exits[-1]["accuracy"])
        assert last["test"]["macs_share"] < first["test"]["macs_share"]


class TestChoice:
    def outcomes(self, directory: Path, policy: dict) -> list[tuple[float, float, float]]:
        """Threshold, accuracy and mean MACs on val of every shared threshold there is, with any
        exits on."""
        logits, targets = stored(directory, "val")
        scores = [slow_scores(e, policy["criterion"], policy["temperatures"]) for e in logits]
        found = []
        # between two neighbouring scores every threshold does the same
        early = sorted({score for row in scores for score in row[:-1]})
        gaps = [(a + b) / 2 for a, b in zip(early, early[1:], strict=False) if b - a > 1e-6]
        for threshold, *on in itertools.product(
            [early[0] - 1, *gaps, early[-1] + 1], (True, False), (True, False)
        ):
            taken = [slow_exit(row, [threshold] * 2, on) for row in scores]
            right = sum(
                exits[index].index(max(exits[index])) == target
                for exits, index, target in zip(logits, taken, targets, strict=True)
            )
            found.append((threshold, right / 100, sum(macs_with(on)[i] for i in taken) / 100))
        return found

    @pytest.mark.parametrize("criterion", ["max_prob", "entropy", "margin"])
    @pytest.mark.parametrize("drop", [0.0, 0.03])
    def test_max_drop_is_the_cheapest_that_keeps_the_accuracy_on_val(self, copy, drop, criterion):
        report, policy = quickly(copy, Goal(max_drop=drop, criterion=criterion))
        outcomes = self.outcomes(copy, policy)
        least = report["exits"][-1]["accuracy_val"] - drop - 1e-9
        cheapest = min(macs for _, accuracy, macs in outcomes if accuracy >= least)
        assert report["val"]["accuracy"] >= least
        assert report["val"]["macs_share"] == pytest.approx(cheapest / PLAIN)

    @pytest.mark.parametrize("share", [0.75, 0.9])
    def test_budget_is_the_most_accurate_within_it_on_val(self, copy, share):
        report, policy = quickly(copy, Goal(budget=share))
        outcomes = self.outcomes(copy, policy)
        best = max(accuracy for _, accuracy, macs in outcomes if macs <= share * PLAIN)
        assert report["val"]["macs_share"] <= share
        assert report["val"]["accuracy"] == pytest.approx(best)

    def test_one_threshold_is_for_all_early_exits(self, copy):
        assert quickly(copy, Goal(thresholds=(0.7,)))[1]["thresholds"] == [0.7, 0.7]

    def test_one_threshold_each(self, copy):
        assert quickly(copy, Goal(thresholds=(0.7, 0.2)))[1]["thresholds"] == [0.7, 0.2]

    def test_temperatures_are_the_best_on_val(self, copy):
        _, policy = quickly(copy, Goal(max_drop=0.0))
        logits, targets = stored(copy, "val")

        def surprise(index: int, temperature: float) -> float:
            return -sum(
                math.log(probabilities(image[index], temperature)[target])
                for image, target in zip(logits, targets, strict=True)
            )

        for index, temperature in enumerate(policy["temperatures"]):
            assert temperature != 1.0
            for other in (0.98 * temperature, 1.02 * temperature):
                assert surprise(index, temperature) < surprise(index, other)

    def test_without_calibration_temperatures_are_one(self, copy):
        _, policy = quickly(copy, Goal(max_drop=0.0, calibrate=False))
        assert policy["temperatures"] == [1.0, 1.0, 1.0]

    @pytest.mark.parametrize("given", [{}, {"max_drop": 0.1, "budget": 0.5}])
    def test_a_goal_is_exactly_one_thing(self, given):
        with pytest.raises(UserError) as caught:
            Goal(**given)
        assert_names(
            str(caught.value), "--max-drop", "--budget", "--latency-budget", "--thresholds",
            "--policy", "--risk", "--delta",
        )


class TestLatency:
    TIMES = StageTimes(
        1, (1,), ((2e-3,), (3e-3,), (5e-3,)), ((1.9e-3,), (2.9e-3,), (5e-3,)), plain=9e-3
    )

    @pytest.fixture
    def timed(self, copy, monkeypatch):
        """A copy of the run on a machine whose stages take 2, 3 and 5 ms."""
        monkeypatch.setattr(evaluation, "stage_times", lambda *_, **__: self.TIMES)
        return copy

    def expected(self, directory, split, policy) -> float:
        taken = slow_outcome(directory, split, policy)["taken"]
        first, second = policy["enabled"]
        stages = (2e-3 if first else 1.9e-3, 3e-3 if second else 2.9e-3, 5e-3)
        return sum(sum(stages[: index + 1]) for index in taken) / len(taken)

    @pytest.mark.parametrize(
        ("budget", "seconds"), [((0.8, "share"), 7.2e-3), ((6e-3, "s"), 6e-3)]
    )
    def test_a_budget_of_seconds_is_kept_on_val(self, timed, budget, seconds):
        report, policy = quickly(timed, Goal(latency=budget))
        said = report["latency"]
        assert said["budget"] == pytest.approx(seconds)
        assert said["val"] == pytest.approx(self.expected(timed, "val", policy))
        assert said["test"] == pytest.approx(self.expected(timed, "test", policy))
        assert said["val"] <= seconds

    def test_a_threshold_for_each_exit_is_never_worse_on_val(self, timed):
        one, _ = quickly(timed, Goal(latency=(0.8, "share")))
        each, policy = quickly(timed, Goal(latency=(0.8, "share"), per_exit=True))
        assert each["latency"]["val"] == pytest.approx(self.expected(timed, "val", policy))
        assert each["latency"]["val"] <= 7.2e-3
        assert each["val"]["accuracy"] >= one["val"]["accuracy"]

    def test_an_exit_that_costs_more_than_it_saves_is_off(self, copy, monkeypatch):
        """The first head takes 90 ms, and 1 without it."""
        dear = StageTimes(1, (1,), ((90e-3,), (3e-3,), (5e-3,)), ((1e-3,), (2e-3,), (5e-3,)), 8e-3)
        monkeypatch.setattr(evaluation, "stage_times", lambda *_, **__: dear)
        report, policy = quickly(copy, Goal(latency=(1.0, "share")))
        assert policy["enabled"][0] is False
        assert report["latency"]["val"] <= 8e-3

    def test_the_page_and_the_screen_say_what_came_of_it(self, timed):
        report, _ = evaluate(
            timed, DOOR, Goal(latency=(0.8, "share")), overrides=CPU, batch_sizes=(4,),
            timing_images=8, draw=False, name="mine",
        )
        page = (timed / "eval" / "mine" / "report.md").read_text()
        for text in (page, evaluation.summary(report, timed / "eval" / "mine")):
            assert_names(text, "7.20 ms", "9.00 ms")  # allowed, and the plain network's
            # measured: the batch of the budget is timed too
            measured = report.timing[0]
            assert_names(text, f"{1000 * measured.live.total / measured.batches:.2f} ms")
        assert [timing.batch_size for timing in report.timing] == [1, 4]

    def test_less_than_the_least_is_refused(self, timed):
        with pytest.raises(UserError) as caught:
            quickly(timed, Goal(latency=(1e-3, "s")))
        assert_names(str(caught.value), "1.00 ms", "2.00 ms")  # asked for, and the least


class TestConditionalDeepLearning:
    def test_the_page_and_the_screen_list_the_stages(self, copy):
        report, directory = evaluate(
            copy, DOOR, Goal(delta=0.6, calibrate=False), overrides=CPU, live=False, draw=False
        )
        assert [stage.name for stage in report.cdl] == list(NAMES[:-1])
        admitted = tuple(stage.admitted for stage in report.cdl)
        assert Policy.load(directory / "policy.yaml").enabled == admitted
        for text in (
            (directory / "report.md").read_text(), evaluation.summary(report, directory)
        ):
            for stage in report.cdl:
                shares = f"{100 * stage.reached:.1f} %", f"{100 * stage.stopped:.1f} %"
                values = (*shares, f"{100 * stage.gain / PLAIN:.2f} %")
                lines = [line for line in text.splitlines() if f"| {stage.name} |" in line]
                assert any(all(value in line for value in values) for line in lines)
            for row in report.energy:
                assert_names(text, f"{row.test / 1e6:.2f}", f"{row.plain / 1e6:.2f}")
        page = (directory / "report.md").read_text()
        assert_names(page, "100 images")  # on which the stages were chosen
        gains = json.loads((directory / "report.json").read_text())["cdl"]
        assert [row["gain"] for row in gains] == [stage.gain for stage in report.cdl]

    def test_other_goals_ask_about_no_stages(self, copy):
        assert quickly(copy, Goal(max_drop=0.02))[0]["cdl"] is None


class TestGuarantee:
    """Of val's 100 images 20 fit and 80 certify."""

    FIT = np.sort(np.random.default_rng(0).permutation(100)[:20])
    GOAL = Goal(risk=0.15, confidence=0.9)

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, finished, tmp_path_factory):
        directory = shutil.copytree(finished, tmp_path_factory.mktemp("guarantee") / "run")
        return directory, *quickly(directory, cls.GOAL)

    def lost(self, directory, split, policy, rows) -> int:
        """How often the full network is right and the policy is wrong, slowly."""
        pairs = list(zip(*stored(directory, split), strict=True))
        slow = slow_outcome(directory, split, policy)
        full = [exits[-1].index(max(exits[-1])) == target for exits, target in pairs]
        return sum(full[row] and not slow["right"][row] for row in rows)

    def test_the_file_says_what_is_guaranteed_and_on_what_ground(self, found):
        directory, _, policy = found
        said = policy["guarantee"]
        certify = np.setdiff1d(np.arange(100), self.FIT)
        assert (said["risk"], said["confidence"], said["loss"]) == (0.15, 0.9, "wrong")
        assert said["images"] == 80
        assert said["losses"] == self.lost(directory, "val", policy, certify)
        assert guarantees.tail(80, said["losses"], 0.15) <= 0.1
        assert_names(said["words"], "15 %", "90 %", 80)  # the risk, the confidence, the images

    def test_test_shows_what_became_of_it(self, found):
        directory, report, policy = found
        assert report["guarantee"]["words"] == policy["guarantee"]["words"]
        assert report["guarantee"]["lost"] == pytest.approx(
            self.lost(directory, "test", policy, range(120)) / 120
        )

    def test_its_price_is_told_against_the_plain_choice(self, found):
        directory, report, _ = found
        plain, _ = quickly(directory, Goal(max_drop=0.15))
        assert report["guarantee"]["plain"] == plain["test"]
        page = (directory / "eval" / "risk-15-wrong-90-max_prob" / "report.md").read_text()
        assert report["guarantee"]["words"] in page
        assert_names(page, f"{100 * plain['test']['accuracy']:.2f} %")

    def test_only_the_fifth_decides_what_is_tried(self, found):
        directory, *_ = found
        val = ExitRecord.load(directory / "records" / "val-off")
        cost = Cost(NAMES, val.info.stage_macs, val.info.head_macs, 0, (0, 0, 0))
        logits = val.logits.copy()
        certify = np.setdiff1d(np.arange(100), self.FIT)
        logits[certify] = np.random.default_rng(1).normal(size=logits[certify].shape)
        policies = [
            choose(record, self.GOAL, cost)
            for record in (val, dataclasses.replace(val, logits=logits))
        ]
        assert policies[0].temperatures == policies[1].temperatures
        fit = val.subset(self.FIT, "val", "")
        scores = score_record(fit, policies[0]).scores[:, :-1]
        for policy in policies:
            assert policy.thresholds[0] in {math.inf, *scores.ravel().tolist()}

    def test_on_average(self, found):
        directory, *_ = found
        _, policy = quickly(directory, Goal(risk=0.15, confidence=None, loss="differs"))
        said = policy["guarantee"]
        assert said["confidence"] is None
        assert (said["losses"] + 1) / 81 <= 0.15

    def test_without_a_goal_of_risk_there_is_none(self, copy):
        report, policy = quickly(copy, Goal(max_drop=0.0))
        assert report["guarantee"] is policy["guarantee"] is None


class TestHonesty:
    """Nothing that is chosen depends on test."""

    @pytest.fixture
    def with_other_test(self, monkeypatch):
        """A door whose test images are turned upside down and their targets permuted."""
        whole = few_digits(0, 320, 100, 120)
        test = whole.splits["test"]
        order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
        other = data.ImageSet(test.images.flip(2), test.targets[order])
        changed = dataclasses.replace(whole, splits={**whole.splits, "test": other})
        return FrontDoor(tiny_network, lambda settings: changed)

    @pytest.mark.parametrize("goal", ["drop 5", "budget 70", "entropy", "patience"])
    def test_the_policy_is_the_same_whatever_test_holds(self, finished, tmp_path, with_other_test,
                                                        goal):
        written = []
        for name, door in (("one", DOOR), ("other", with_other_test)):
            directory = shutil.copytree(finished, tmp_path / name)
            shutil.rmtree(directory / "records")
            report, where = evaluate(
                directory, door, GOALS[goal], overrides=CPU, live=False, draw=False
            )
            written.append((where / "policy.yaml").read_bytes())
            final = report.final_accuracy
        assert written[0] == written[1]
        assert final < 0.5  # the other test is really another

    def test_val_and_test_of_a_cut_are_halves_of_test(self, copy):
        report, _ = quickly(copy, Goal(max_drop=0.0), val_from="test", cut_seed=3)
        assert (report["val_images"], report["test_images"]) == (60, 60)
        assert_names(report["val_from"], "test", 3)

    def test_a_cut_reports_its_own_half_alone(self, copy):
        report, policy = quickly(copy, Goal(max_drop=0.05), val_from="test", cut_seed=3)
        slow = slow_outcome(copy, "test", policy)
        _, rest = some_digits(DataConfig()).test_halves(3)
        right = [slow["right"][index] for index in rest]
        assert report["test"]["accuracy"] == pytest.approx(sum(right) / 60)

    def test_several_cuts_are_mean_and_deviation_of_each(self, copy):
        goal = Goal(max_drop=0.02)
        each = [quickly(copy, goal, val_from="test", cut_seed=seed)[0] for seed in (5, 6, 7)]
        report, _ = quickly(copy, goal, val_from="test", cut_seed=5, cuts=3)
        accuracy = [one["test"]["accuracy"] for one in each]
        assert report["cuts"]["count"] == 3
        assert report["cuts"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracy))
        assert report["cuts"]["accuracy"]["std"] == pytest.approx(np.std(accuracy, ddof=1))
        assert report["cuts"]["macs_share"]["mean"] == pytest.approx(
            np.mean([one["test"]["macs_share"] for one in each])
        )
        assert report["test"] == each[0]["test"]


class TestBackbonesSplit:
    """Val must be unseen by every weight, the backbone's included."""

    refused = "--val-from test"

    @pytest.fixture(scope="class")
    @classmethod
    def elsewhere(cls, plain, tmp_path_factory) -> Path:
        """A frozen run on a backbone of which nothing is known."""
        root = tmp_path_factory.mktemp("elsewhere")
        torch.save(checkpoint.load_backbone(plain)[0], root / "public.th")
        return trained(
            root / "run", epochs=1, backbone=str(root / "public.th"), regime="frozen"
        )

    def test_an_unknown_split_is_refused(self, elsewhere):
        with pytest.raises(UserError, match=self.refused) as caught:
            quickly(elsewhere, Goal(max_drop=0.0))
        assert str(elsewhere) in str(caught.value)
        assert not (elsewhere / "eval").exists()

    def test_it_is_accepted_with_val_from_test_and_the_report_says_so(self, elsewhere, tmp_path):
        directory = shutil.copytree(elsewhere, tmp_path / "run")
        report, _ = quickly(directory, Goal(max_drop=0.0), val_from="test")
        assert_names(report["val_from"], "test", 0)

    @pytest.mark.parametrize("regime", ["frozen", "mixed"])
    def test_a_backbone_of_another_split_is_refused(self, plain, tmp_path, regime):
        run = trained(
            tmp_path / "run", split_seed=1, epochs=1, backbone=str(plain), regime=regime
        )
        with pytest.raises(UserError, match=self.refused):
            quickly(run, Goal(max_drop=0.0))
        assert quickly(run, Goal(max_drop=0.0), val_from="test")

    def test_a_backbone_of_the_same_split_is_accepted(self, plain, tmp_path):
        run = trained(tmp_path / "run", epochs=1, backbone=str(plain), regime="frozen")
        report, _ = quickly(run, Goal(max_drop=0.0))
        assert_names(report["val_from"], "train")

    def test_a_backbone_of_a_backbone_of_another_split_is_refused(self, plain, tmp_path):
        """What the first backbone has seen is not forgotten on the way."""
        first = trained(tmp_path / "a", split_seed=1, epochs=1, backbone=str(plain), regime="mixed")
        run = trained(
            tmp_path / "b", split_seed=1, epochs=1, backbone=str(first), regime="frozen"
        )
        with pytest.raises(UserError, match=self.refused):
            quickly(run, Goal(max_drop=0.0))

    def test_the_command_line_refuses_with_one_line(self, elsewhere, monkeypatch, capsys):
        monkeypatch.setattr(script, "DOOR", DOOR)
        code, _, err = run_main(
            script.main, "eval.py", monkeypatch, capsys, elsewhere, *FLAGS
        )
        assert code == 2
        assert err.count("\n") == 1


class TestMistakes:
    @pytest.fixture
    def refusal(self, monkeypatch, capsys):
        """A function that runs eval.py and gives the one line in which it ends."""
        monkeypatch.setattr(script, "DOOR", DOOR)

        def call(*arguments) -> str:
            code, _, err = run_main(script.main, "eval.py", monkeypatch, capsys, *arguments, *FLAGS)
            assert code == 2
            assert err.startswith("eval.py: ")
            assert err.count("\n") == 1
            return err.removeprefix("eval.py: ").rstrip("\n")

        return call

    @pytest.mark.parametrize(
        "goals", [("--max-drop", "1", "--budget", "50"), ("--budget", "50", "--thresholds", "0.5")]
    )
    def test_two_goals(self, refusal, copy, goals):
        assert_names(refusal(copy, *goals), *goals[::2])

    def test_a_budget_that_cannot_be_kept(self, refusal, copy):
        message = refusal(copy, "--budget", "10")
        assert_names(message, f"{MACS[0] / 1e6:.2f} M", f"{0.1 * PLAIN / 1e6:.2f} M")
        assert not (copy / "eval").exists()

    def test_too_few_images_for_a_risk(self, refusal, copy):
        message = refusal(copy, "--risk", "1")
        assert_names(message, 80, "1 %", "95 %", 299)  # 0.99 ** 298 > 0.05 > 0.99 ** 299

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--confidence", "90"), ["--confidence", "--risk"]),
            (("--on-average",), ["--on-average", "--risk"]),
            (("--risk", "5", "--on-average", "--confidence", "90"), ["--on-average"]),
            (("--latency-budget", "3"), ["--latency-budget", "'3'", "3ms", "60%"]),
            (("--latency-budget", "x%"), ["--latency-budget", "'x%'", "3ms", "60%"]),
            (("--latency-budget=-3ms",), ["--latency-budget"]),
            (("--latency-budget", "3ms", "--latency-batch", "500"), [100, "--latency-batch", 500]),
            (("--thresholds", "0.5", "--per-exit"), ["--per-exit", "--thresholds"]),
            (("--policy", "x", "--criterion", "margin"), ["--policy"]),
            (("--policy", "x", "--no-calibration"), ["--policy"]),
            (("--thresholds=-inf",), ["threshold"]),
            (("--policy", "no.yaml", "--per-exit"), ["no.yaml"]),
            (("--policy", "no.yaml"), ["no.yaml"]),
            (("--epsilon", "1"), ["--epsilon", "--delta"]),
            (("--latency-batch", "4"), ["--latency-batch", "--latency-budget"]),
            (("--delta", "0.3"), ["--delta", 0.3, 0.5]),
            (("--delta", "0.9", "--criterion", "margin"), ["--delta", "--criterion margin"]),
            (("--risk", "100"), ["--risk", 100]),
            (("--risk", "5", "--confidence", "100"), ["--confidence", 100]),
        ],
    )
    def test_flags_of_a_goal(self, refusal, copy, flags, said):
        assert_names(refusal(copy, *flags), *said)

    def test_branchynets_t_without_its_minus(self, refusal, copy):
        message = refusal(copy, "--criterion", "entropy", "--thresholds", "0.3")
        assert_names(message, "entropy", "--thresholds=-0.3")

    def test_patience_with_one_early_exit(self, refusal, one_exit):
        message = refusal(one_exit, "--criterion", "patience")
        assert_names(message, "patience")

    def test_cuts_of_a_val_that_is_not_from_test(self, refusal, copy):
        for flags in (("--cuts", "3"), ("--cut-seed", "1")):
            assert_names(refusal(copy, *flags), flags[0], "--val-from test")

    def test_thresholds_that_do_not_fit_the_exits(self, refusal, copy):
        assert_names(refusal(copy, "--thresholds", "0.1", "0.2", "0.3"), "thresholds", 3, 2)

    def test_a_criterion_that_is_not_there(self, refusal, copy):
        message = refusal(copy, "--criterion", "oracle")
        assert_names(message, *CRITERIA)

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--max-drop", "101"), ["--max-drop", 101, 100]),
            (("--max-drop=-1",), ["--max-drop", -1, 100]),
            (("--budget", "0"), ["--budget", 0]),
            (("--cuts", "0"), ["--cuts", 1, 0]),
            (("--batch-sizes", "4", "0"), ["--batch-sizes", 1, 0]),
            (("--timing-images", "0"), ["--timing-images", 1, 0]),
            (("--thresholds", "nan"), ["threshold"]),
        ],
    )
    def test_numbers_out_of_range(self, refusal, copy, flags, said):
        assert_names(refusal(copy, *flags), *said)

    def test_a_seed_no_generator_takes(self, refusal, copy):
        assert "seed" in refusal(copy, "--val-from", "test", "--cut-seed=-1")

    def test_a_run_that_is_missing(self, refusal, tmp_path):
        message = refusal(tmp_path / "none")
        assert_names(message, tmp_path / "none")

    def test_a_run_without_a_checkpoint(self, refusal, tmp_path):
        assert_names(refusal(tmp_path), tmp_path)

    def test_data_that_hold_out_other_images(self, refusal, copy, monkeypatch):
        other = FrontDoor(tiny_network, lambda settings: few_digits(1, 320, 100, 120))
        monkeypatch.setattr(script, "DOOR", other)
        hashes = (few_digits(seed, 320, 100, 120).val_hash for seed in (0, 1))
        assert_names(refusal(copy), copy, *hashes)

    @pytest.mark.parametrize("name", [".", "..", "../../precious", "a/b", "/precious"])
    def test_a_name_that_is_no_plain_name_is_refused_and_nothing_is_lost(
        self, refusal, copy, tmp_path, name
    ):
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "file").write_text("mine")
        name = str(precious) if name.startswith("/") else name
        assert "--name" in refusal(copy, "--name", name)
        assert (precious / "file").exists()
        assert (copy / checkpoint.NAME).exists()


# What float32 makes of a logit, beside the largest: some thousand products a path from the image
ROUNDING = 3000 * np.finfo(np.float32).eps


def test_a_plain_network_has_nothing_to_choose(plain):
    """Its report is a point, which others are compared with."""
    report, policy = quickly(plain, Goal(max_drop=0.005), live=True, draw=True, batch_sizes=(1,))
    logits, targets = stored(plain, "test")
    right = sum(exits[0].index(max(exits[0])) == target
                for exits, target in zip(logits, targets, strict=True))
    assert report["test"] == {"accuracy": right / len(targets), "macs_share": 1.0}
    assert [row["name"] for row in report["exits"]] == ["final"]
    assert len(report["curve"]) == 1
    assert policy["thresholds"] == []
    # only an image whose best two classes are as close as rounding may get another answer
    gaps = [sorted(exits[0])[-1] - sorted(exits[0])[-2] for exits in logits]
    assert report["live"]["differing"] <= sum(gap < ROUNDING * np.abs(logits).max() for gap in gaps)


def test_a_gallery_of_single_images_can_be_drawn(tmp_path):
    row = [Picture(np.zeros((4, 4, 3), np.uint8), "cat", False, "cat, is dog")]
    plots.gallery([("first", row), ("second", row)], tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
def test_images_that_are_all_as_confused_can_be_drawn(tmp_path):
    plots.confusion(np.zeros(5), np.array([True] * 5), tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000


class TestLive:
    """Live inference against the records of the same network, with thresholds that lie in gaps
    between the scores, which are far wider than what rounding changes."""

    @pytest.fixture(scope="class")
    @classmethod
    def lived(cls, real, tmp_path_factory) -> tuple[dict, Path, np.ndarray]:
        """The report, its directory, and which exit each image of test takes on the record."""
        directory = shutil.copytree(real, tmp_path_factory.mktemp("live") / "run")
        remaining = [slow_scores(e, "max_prob", [1.0] * 3) for e in stored(directory, "test")[0]]
        thresholds = []
        for index in range(2):
            ordered = np.sort([scores[index] for scores in remaining])
            middle = ordered[len(ordered) // 4 : -(len(ordered) // 4)]
            widest = int(np.diff(middle).argmax())
            thresholds.append(float(middle[widest : widest + 2].mean()))
            assert np.diff(middle).max() > 4 * ROUNDING
            remaining = [scores for scores in remaining if scores[index] < thresholds[index]]
        goal = Goal(thresholds=tuple(thresholds), calibrate=False)
        report, _ = quickly(directory, goal, live=True, name="mine")
        where = directory / "eval" / "mine"
        policy = yaml.safe_load((where / "policy.yaml").read_text())
        return report, where, np.array(slow_outcome(directory, "test", policy)["taken"])

    def close(self, where: Path, taken: np.ndarray) -> int:
        """Images whose best two classes, at the exit they take, are as close as rounding."""
        logits = np.array(stored(where.parent.parent, "test")[0])
        second, best = np.sort(logits[np.arange(len(taken)), taken])[:, -2:].T
        return int((best - second < ROUNDING * np.abs(logits).max()).sum())

    def test_every_exit_is_taken(self, lived):
        _, _, taken = lived
        assert np.bincount(taken, minlength=3).min() > 10

    def test_policy_yaml_gives_the_reports_exits_and_accuracy_live(self, lived):
        report, where, taken = lived
        network = tiny_network(Config(model=ModelConfig(exits=("layer1", "layer2"))), 10).eval()
        network.load_state_dict(checkpoint.load(where.parent.parent)["network"])
        ((images, targets),) = some_digits(DataConfig()).eval_batches("test", 120)
        answers = infer(network, images, Policy.load(where / "policy.yaml"))
        assert answers.exit_index.tolist() == taken.tolist()
        right = int((answers.classes == targets).sum())
        assert abs(right - 120 * report["test"]["accuracy"]) <= self.close(where, taken) + 1e-9

    def test_live_inference_agrees_with_the_record(self, lived):
        report, where, taken = lived
        live = report["live"]
        assert live["images"] == 120
        assert live["differing_beyond_rounding"] <= live["differing"] <= self.close(where, taken)
        differing = live["differing"] / 120
        assert abs(live["accuracy"] - report["test"]["accuracy"]) <= differing + 1e-9


class TestFiles:
    @pytest.fixture(scope="class")
    @classmethod
    def written(cls, finished, tmp_path_factory) -> Path:
        """A whole evaluation, exits taken and timed, with pictures. Not to be changed."""
        directory = shutil.copytree(finished, tmp_path_factory.mktemp("files") / "run")
        _, where = evaluate(
            directory, DOOR, Goal(max_drop=0.02), overrides=CPU, batch_sizes=(1, 8, 500),
            timing_images=20,
        )
        return where

    def test_their_names(self, written):
        assert {path.name for path in written.iterdir()} == {
            "policy.yaml", "report.json", "report.md", "accuracy_vs_macs.png",
            "share_per_exit.png", "gallery.png", "reliability.png", "confusion.png",
            "overthinking.png", "report.html",
        }

    def test_the_directory_is_named_after_the_goal(self, written):
        assert written.name == "max-drop-2-max_prob"
        assert written.parent.name == "eval"

    def test_pictures_are_pictures(self, written):
        from matplotlib import image

        for path in written.glob("*.png"):
            pixels = image.imread(path)
            assert min(pixels.shape[:2]) > 100
            assert pixels[..., :3].std() > 0.01  # something is drawn

    def test_policy_yaml_is_the_policy(self, written):
        policy = Policy.load(written / "policy.yaml")
        assert policy.exit_names == NAMES
        assert policy.criterion == "max_prob"

    def test_report_json_is_strict_json(self, written):
        def refuse(constant):
            raise AssertionError(f"{constant} is no JSON")

        json.loads((written / "report.json").read_text(), parse_constant=refuse)

    def test_report_md_shows_every_exit_and_every_picture(self, written):
        page = (written / "report.md").read_text()
        for name in NAMES:
            assert f"| {name} | " in page
        for path in written.glob("*.png"):
            assert f"]({path.name})" in page

    def test_report_names_what_was_measured_on_what(self, written):
        report = json.loads((written / "report.json").read_text())
        assert report["dataset"] == "digits"
        assert_names(report["val_from"], "train")
        assert (report["val_images"], report["test_images"]) == (100, 120)
        assert re.search(r"\b[0-9a-f]{16}\b", report["weights"])
        assert not re.search(r"\bjoint\b", report["weights"])  # the phase, of an unfinished run
        assert report["versions"]["torch"] == torch.__version__.partition("+")[0]

    def test_whole_batches_of_no_more_than_the_asked_images_are_timed(self, written):
        timing = json.loads((written / "report.json").read_text())["timing"]
        assert [one["batch_size"] for one in timing] == [1, 8]  # 500 is more than there are
        for one in timing:
            assert 0 < one["images"] <= 20
            assert one["images"] % one["batch_size"] == 0
            assert one["live"]["total"] > 0
            assert sum(one["stage_shares"]) == pytest.approx(1)

    def test_without_live_and_plots_there_are_none(self, copy):
        report, _ = quickly(copy, Goal(max_drop=0.02))
        assert report["live"] is None and report["timing"] == []
        assert not list((copy / "eval").rglob("*.png"))
        assert "![" not in (copy / "eval" / "max-drop-2-max_prob" / "report.md").read_text()

    @pytest.mark.parametrize(
        ("goal", "name"),
        [
            (Goal(budget=0.9), "budget-90-max_prob"),
            (Goal(thresholds=(0.5, 0.25), criterion="margin"), "thresholds-0.5-0.25-margin"),
            (Goal(max_drop=0.0, calibrate=False), "max-drop-0-max_prob-uncalibrated"),
        ],
    )
    def test_other_goals_have_other_names(self, copy, goal, name):
        quickly(copy, goal)
        assert [path.name for path in (copy / "eval").iterdir()] == [name]

    def test_a_given_name_is_taken(self, copy):
        quickly(copy, Goal(max_drop=0.0), name="mine")
        assert [path.name for path in (copy / "eval").iterdir()] == ["mine"]

    def test_an_earlier_one_of_the_name_is_replaced(self, copy):
        quickly(copy, Goal(max_drop=0.0), name="mine")
        (copy / "eval" / "mine" / "stray").write_text("old")
        report, _ = quickly(copy, Goal(budget=0.9), name="mine")
        assert_names(report["chosen_by"], "budget", 90)
        assert not (copy / "eval" / "mine" / "stray").exists()

    def test_evaluations_of_other_names_are_left_alone(self, copy):
        quickly(copy, Goal(max_drop=0.0), name="mine")
        before = (copy / "eval" / "mine" / "report.json").read_bytes()
        quickly(copy, Goal(budget=0.9), name="other")
        assert (copy / "eval" / "mine" / "report.json").read_bytes() == before

    def test_it_is_in_float32_whatever_training_was(self, copy, monkeypatch, capsys):
        monkeypatch.setattr(script, "DOOR", DOOR)
        state = checkpoint.load(copy)
        state["config"]["run"]["amp"] = "bf16"
        checkpoint.save(copy, state)
        run_main(script.main, "eval.py", monkeypatch, capsys, copy, "--name", "mine", *FLAGS)
        report = json.loads((copy / "eval" / "mine" / "report.json").read_text())
        assert report["precision"] == "float32"

    def test_the_screen_shows_the_table_and_where_the_files_are(self, copy, monkeypatch, capsys):
        monkeypatch.setattr(script, "DOOR", DOOR)
        code, out, _ = run_main(script.main, "eval.py", monkeypatch, capsys, copy, *FLAGS)
        assert code == 0
        assert "| layer1" in out and "| final | " in out
        assert str(copy / "eval" / "max-drop-0.5-max_prob" / "report.md") in out


class TestNothingHalfWritten:
    @pytest.fixture
    def failing_plot(self, monkeypatch):
        def fail(*_):
            raise RuntimeError("no such font")

        monkeypatch.setattr(plots, "gallery", fail)

    def visible(self, directory: Path) -> list[str]:
        """The evaluations that a user sees."""
        return [path.name for path in directory.glob("eval/[!.]*")]

    def test_a_failing_plot_leaves_no_evaluation(self, copy, failing_plot):
        with pytest.raises(RuntimeError, match="no such font"):
            quickly(copy, Goal(max_drop=0.0), name="mine", draw=True)
        assert self.visible(copy) == []

    def test_a_failing_plot_leaves_the_previous_one_whole(self, copy, failing_plot):
        quickly(copy, Goal(max_drop=0.0), name="mine")
        before = {path.name: path.read_bytes() for path in (copy / "eval/mine").iterdir()}
        with pytest.raises(RuntimeError, match="no such font"):
            quickly(copy, Goal(budget=0.9), name="mine", draw=True)
        after = {path.name: path.read_bytes() for path in (copy / "eval/mine").iterdir()}
        assert after == before
        assert self.visible(copy) == ["mine"]

    def test_what_a_failure_left_is_gone_after_the_next(self, copy, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(plots, "accuracy_vs_macs", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                quickly(copy, Goal(max_drop=0.0), name="mine", draw=True)
        quickly(copy, Goal(max_drop=0.0), name="mine")
        assert [path.name for path in (copy / "eval").iterdir()] == ["mine"]


class TestRecords:
    @pytest.fixture
    def recorded(self, monkeypatch) -> list[str]:
        """The splits that were recorded, one after the other."""
        splits, record = [], trained_run.record

        def noted(network, batches, count, info, *rest):
            splits.append(info.split)
            return record(network, batches, count, info, *rest)

        monkeypatch.setattr(trained_run, "record", noted)
        return splits

    def test_they_are_reused_where_weights_and_images_are_the_same(self, copy, recorded):
        quickly(copy, Goal(max_drop=0.0))
        quickly(copy, Goal(budget=0.9, criterion="entropy"))
        assert recorded == []

    def test_they_are_made_anew_where_the_weights_changed(self, copy, recorded):
        before, _ = quickly(copy, Goal(max_drop=0.0))
        state = checkpoint.load(copy)
        state["network"]["backbone.linear.weight"].zero_()
        checkpoint.save(copy, state)
        after, _ = quickly(copy, Goal(max_drop=0.0))
        assert sorted(recorded) == ["test", "val"]
        assert after["final_accuracy"] < before["final_accuracy"]

    def test_they_are_made_anew_where_one_is_damaged(self, copy, recorded, caplog):
        (copy / "records" / "val-off" / "logits.npy").write_bytes(b"torn")
        with caplog.at_level(logging.WARNING):
            quickly(copy, Goal(max_drop=0.0))
        assert recorded == ["val"]
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert_names(warning, copy / "records" / "val-off")

    def test_another_precision_has_records_of_its_own(self, copy, recorded):
        require_precision("bf16")
        quickly(copy, Goal(max_drop=0.0), overrides={"run": {**CPU["run"], "amp": "bf16"}})
        assert sorted(recorded) == ["test", "val"]
        assert {path.name for path in (copy / "records").iterdir() if path.is_dir()} == {
            "val-off", "test-off", "val-bf16", "test-bf16"
        }

    def test_two_evaluations_of_one_name_write_one_after_the_other(self, copy, monkeypatch):
        """And not each into what the other is about to move into place."""
        original, inside = evaluation.to_json, threading.Lock()
        both, intruding = threading.Event(), threading.Event()
        arrived, lock = [], evaluation.locked

        def asking(*arguments, **options):
            arrived.append(1)
            if len(arrived) == 2:
                both.set()
            return lock(*arguments, **options)

        def slowly(report):
            if not inside.acquire(blocking=False):
                intruding.set()
                raise AssertionError("the other one is writing")
            try:
                assert both.wait(600)  # until the other one asks for its turn
                assert not intruding.wait(0.3)  # and, where it need not wait for it, gets here
                return original(report)
            finally:
                inside.release()

        monkeypatch.setattr(evaluation, "locked", asking)
        monkeypatch.setattr(evaluation, "to_json", slowly)
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(quickly, copy, Goal(max_drop=0.0), name="one") for _ in range(2)]
            (one, _), (two, _) = (job.result() for job in jobs)
        assert one["test"] == two["test"]
        assert {path.name for path in (copy / "eval").iterdir()} == {"one"}

    def test_two_evaluations_at_once_record_once(self, copy, recorded):
        """The second waits for the first, and finds what it made."""
        shutil.rmtree(copy / "records")
        with ThreadPoolExecutor() as pool:
            jobs = [
                pool.submit(quickly, copy, Goal(max_drop=0.0), name=name) for name in ("one", "two")
            ]
            (one, _), (two, _) = (job.result() for job in jobs)
        assert one["test"] == two["test"]
        assert sorted(recorded) == ["test", "val"]


class TestUnfinished:
    def test_a_run_that_is_not_finished_is_evaluated_and_the_report_says_so(
        self, finished, tmp_path, caplog
    ):
        directory = tmp_path / "run"
        directory.mkdir()
        shutil.copy(finished / checkpoint.PREVIOUS, directory / checkpoint.NAME)
        with caplog.at_level(logging.WARNING):
            report, _ = quickly(directory, Goal(max_drop=0.0))
        assert_names(report["weights"], 7, 8, "joint")  # the epoch, of how many, and the phase
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert_names(warning, 7, 8, "joint")
