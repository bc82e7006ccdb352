"""The numbers of a report, against a slow recomputation from the records."""

import dataclasses
import math
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from by_hand import (
    CLOSE,
    GOALS,
    HEADS,
    MACS,
    NAMES,
    PLAIN,
    TASK,
    quickly,
    slow_outcome,
    slow_scores,
    stored,
)
from helpers import CPU, assert_names, tiny_network

from cifar10.resnet import ResNet
from early_exit.choosing.choice import choose
from early_exit.choosing.goals import FixedThresholds
from early_exit.choosing.outcome import Outcome, apply_policy
from early_exit.config import Config, ModelConfig
from early_exit.evaluation import rows
from early_exit.inference.policy import Policy
from early_exit.model import energy
from early_exit.model.cost import network_cost
from early_exit.task import StaticNetwork
from early_exit.trained import Splits, get_splits, load_run


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
        exited = [row["exited"] for row in report["exits"]]
        assert sum(exited) == pytest.approx(1)
        assert exited == pytest.approx(
            [slow["exit_index"].count(index) / 120 for index in range(3)]
        )

    def test_accuracy_on_the_images_that_exit_at_each_exit(self, found):
        report, _, slow = found
        for index, row in enumerate(report["exits"]):
            here = [
                r for r, t in zip(slow["correct"], slow["exit_index"], strict=True) if t == index
            ]
            expected = sum(here) / len(here) if here else None
            assert row["exited_accuracy"] == pytest.approx(expected)

    def test_random_exits_of_as_many_images_at_each_exit(self, found):
        report, _, slow = found
        accuracies = [row["accuracy"] for row in report["exits"]]
        expected = sum(slow["exit_index"].count(i) / 120 * one for i, one in enumerate(accuracies))
        assert report["random_accuracy"] == pytest.approx(expected)

    def test_thresholds_and_temperatures_are_the_policys(self, found):
        report, policy, _ = found
        thresholds = [row["threshold"] for row in report["exits"]]
        assert thresholds[-1] is None
        assert [math.inf if t is None else t for t in thresholds[:-1]] == policy["thresholds"]
        assert [row["temperature"] for row in report["exits"]] == policy["temperatures"]


class TestRows:
    """The values of each exit, whatever the goal."""

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, finished, tmp_path_factory) -> tuple[Path, list[dict], dict]:
        directory = shutil.copytree(finished, tmp_path_factory.mktemp("rows") / "run")
        report, _ = quickly(directory, FixedThresholds((0.8,)))
        return directory, report["exits"], report

    def test_names(self, found):
        assert [row["name"] for row in found[1]] == list(NAMES)

    def test_multiply_adds_of_each_exit_are_those_counted_by_hand(self, found):
        assert [row["macs"] for row in found[1]] == list(MACS)
        assert found[2]["plain_macs"] == PLAIN
        assert [row["macs_share"] for row in found[1]] == pytest.approx([m / PLAIN for m in MACS])
        assert [row["head_share"] for row in found[1]] == pytest.approx(
            [HEADS[0] / PLAIN, HEADS[1] / PLAIN, 0.0]
        )

    @pytest.mark.parametrize(("split", "key"), [("val", "accuracy_val"), ("test", "accuracy")])
    def test_accuracy_of_each_exit_alone(self, found, split, key):
        directory, exits, _ = found
        logits, targets = stored(directory, split)
        for index, row in enumerate(exits):
            correct = sum(
                image[index].index(max(image[index])) == target
                for image, target in zip(logits, targets, strict=True)
            )
            assert row[key] == pytest.approx(correct / len(targets))

    def test_continuing_auroc_ranks_the_images_that_continuing_would_help(self, found):
        directory, exits, _ = found
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
                for a, one in zip(scores, helped, strict=True)
                if one
                for b, other in zip(scores, helped, strict=True)
                if not other
            ]
            assert row["continuing_auroc"] == pytest.approx(sum(lower) / len(lower), abs=1e-6)
        assert exits[-1]["continuing_auroc"] is None

    def test_classes_by_hand(self, found):
        directory, _, report = found
        policy = yaml.safe_load(next((directory / "eval").glob("*/policy.yaml")).read_text())
        slow, targets = slow_outcome(directory, "test", policy), stored(directory, "test")[1]
        assert [row["name"] for row in report["classes"]] == [str(digit) for digit in range(10)]
        for digit, row in enumerate(report["classes"]):
            here = [index for index, target in enumerate(targets) if target == digit]
            macs = [MACS[slow["exit_index"][index]] / PLAIN for index in here]
            assert row["images"] == len(here)
            assert row["accuracy"] == pytest.approx(
                sum(slow["correct"][index] for index in here) / len(here)
            )
            assert row["macs_share"] == pytest.approx(sum(macs) / len(macs))

    def test_energy_is_that_of_the_exits_that_images_take(self, found):
        _, exits, report = found
        network = tiny_network(Config(model=ModelConfig(exits=NAMES[:-1])), 10)
        exited = [row["exited"] for row in exits]
        assert [row["weights"] for row in report["energy"]] == ["SRAM", "DRAM"]
        for row in report["energy"]:
            found = energy.estimate(network, network_cost(network))[row["weights"]]
            assert row["plain"] == pytest.approx(found.plain)
            assert row["test"] == pytest.approx(np.dot(exited, found.cumulative()))

    def test_overthinking_is_that_of_the_record(self, found):
        directory, _, report = found
        images = [
            [one.index(max(one)) == target for one in image]
            for image, target in zip(*stored(directory, "test"), strict=True)
        ]
        destructive = sum(any(correct[:-1]) and not correct[-1] for correct in images)
        wasteful = sum(any(correct[:-1]) and correct[-1] for correct in images)
        assert report["overthinking"]["destructive"] == pytest.approx(destructive / 120)
        assert report["overthinking"]["wasteful"] == pytest.approx(wasteful / 120)

    def test_final_accuracy_is_the_last_exits(self, found):
        assert found[2]["final_accuracy"] == found[1][-1]["accuracy"]

    def test_the_records_are_good_enough_to_test_with(self, found):
        directory, exits, _ = found
        accuracy = [row["accuracy"] for row in exits]
        assert accuracy[0] < accuracy[-1]
        assert accuracy[-1] > 0.5
        images = [image for split in ("val", "test") for image in stored(directory, split)[0]]
        for temperatures in ([1.0] * 3, [row["temperature"] for row in exits]):
            for criterion in ("max_prob", "margin", "entropy"):
                scores = [slow_scores(image, criterion, temperatures)[:-1] for image in images]
                assert np.diff(np.unique(scores)).min() > 2 * CLOSE

    def test_the_curve_ends_at_the_final_exit_and_at_the_first(self, found):
        _, exits, report = found
        first, last = report["curve"][0], report["curve"][-1]
        assert first["threshold"] is None
        assert first["test"]["accuracy"] == pytest.approx(exits[-1]["accuracy"])
        assert last["test"]["macs_share"] < first["test"]["macs_share"]


class TestGalleries:
    @pytest.fixture(scope="class")
    @classmethod
    def outcome(cls, finished) -> tuple[Outcome, Splits]:
        loaded = load_run(finished, TASK, CPU)
        splits = get_splits(loaded, "train", 0)
        policy = choose(splits.val, FixedThresholds((0.6,)), loaded.cost)
        return apply_policy(policy, splits.test, loaded.cost), splits

    def test_each_exit_has_its_easiest_and_its_hardest_images(self, outcome):
        outcome, splits = outcome
        found = rows.gallery(outcome, splits)
        assert [caption.split("\n")[0] for caption, _ in found] == [
            name for name in NAMES for _ in range(2)
        ]
        for index in range(3):
            here = np.flatnonzero(outcome.exit_index == index)
            scores = np.sort(outcome.scored.scores[here, index])
            easiest, hardest = (pictures for _, pictures in found[2 * index : 2 * index + 2])
            assert_names(easiest[0].words, NAMES[index], f"{scores[-1]:.3f}")
            assert_names(hardest[0].words, NAMES[index], f"{scores[0]:.3f}")
            assert len(easiest) + len(hardest) <= len(here)  # no image twice

    def test_a_picture_is_correct_if_its_answer_is_its_target(self, outcome):
        for _, pictures in rows.gallery(*outcome):
            for picture in pictures:
                answer, target = re.search(r"answer (\d), target (\d)", picture.words).groups()
                assert picture.label == answer and picture.correct == (answer == target)

    def test_overthought_images_are_wrong_at_the_final_exit_alone(self, outcome):
        outcome, splits = outcome
        correct = outcome.scored.correct
        lost = ~correct[:, -1] & correct[:, :-1].any(axis=1)
        found = rows.overthought(outcome, splits)
        counts = [int(re.search(r"\d+", caption.split("\n")[1]).group()) for caption, _ in found]
        assert sum(counts) == lost.sum() > 0
        assert not any(picture.correct for _, pictures in found for picture in pictures)


def test_static_networks_much_more_expensive_than_the_plain_one_are_not_shown():
    network = tiny_network(Config(model=ModelConfig(exits=NAMES[:-1])), 10)
    known = [
        StaticNetwork(f"{blocks}", 0.5, "somebody", partial(ResNet, blocks)) for blocks in (1, 2)
    ]
    found = rows.static_networks(known, network, network_cost(network))
    assert [(row.name, row.macs_share) for row, _ in found] == [("1", 1.0)]  # the same network


def test_the_smallest_static_network_is_shown_where_all_are_more_expensive():
    network = tiny_network(Config(model=ModelConfig(exits=NAMES[:-1])), 10)
    known = [
        StaticNetwork(f"{blocks}", 0.5, "somebody", partial(ResNet, blocks)) for blocks in (3, 2)
    ]
    found = rows.static_networks(known, network, network_cost(network))
    assert [row.name for row, _ in found] == ["2"]


def test_a_gallery_compares_classes_and_not_their_names(finished):
    """Two classes may have one name."""
    trained = load_run(finished, TASK, CPU)
    splits = get_splits(trained, "train", 0)
    named = dataclasses.replace(splits.data, classes=("crane",) * 10)
    policy = Policy(exit_names=NAMES, thresholds=(0.0, 0.0))
    outcome = apply_policy(policy, splits.test, trained.cost)
    pictures = [
        picture
        for _, row in rows.gallery(outcome, dataclasses.replace(splits, data=named))
        for picture in row
    ]
    assert pictures and {picture.correct for picture in pictures} == {True, False}
