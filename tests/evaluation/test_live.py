"""Inference with exits taken on test, and what is timed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from by_hand import NAMES, ROUNDING, TASK, quickly, slow_outcome, slow_scores, some_digits, stored
from helpers import CPU, assert_names, tiny_network

from early_exit.choosing.goals import FixedThresholds
from early_exit.config import Config, DataConfig, ModelConfig
from early_exit.errors import UserError
from early_exit.evaluation.live import (
    build_networks,
    evenly,
    time_batch,
    time_for_choice,
    whole_batches,
)
from early_exit.inference.infer import infer
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.eager import EagerRuntime
from early_exit.trained import first_batch, load_run, one_by_one
from early_exit.training import checkpoint

ROWS = np.arange(120)  # of test


class TestLive:
    """Inference with exits taken against the records of the same network, with thresholds in gaps
    between the scores that are far wider than what rounding changes."""

    @pytest.fixture(scope="class")
    @classmethod
    def measured(cls, real, tmp_path_factory) -> tuple[dict, Path, np.ndarray]:
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
        goal = FixedThresholds(tuple(thresholds), calibrate=False)
        report, _ = quickly(directory, goal, live=True, name="mine")
        where = directory / "eval" / "mine"
        policy = yaml.safe_load((where / "policy.yaml").read_text())
        return report, where, np.array(slow_outcome(directory, "test", policy)["exit_index"])

    def ambiguous(self, where: Path, exit_index: np.ndarray) -> int:
        """Images whose best two classes, at the exit they take, are as close as rounding."""
        logits = np.array(stored(where.parent.parent, "test")[0])
        second, best = np.sort(logits[np.arange(len(exit_index)), exit_index])[:, -2:].T
        return int((best - second < ROUNDING * np.abs(logits).max()).sum())

    def test_images_exit_at_every_exit(self, measured):
        _, _, exit_index = measured
        assert np.bincount(exit_index, minlength=3).min() > 10

    def test_policy_yaml_gives_the_exits_and_accuracy_of_the_report(self, measured):
        report, where, exit_index = measured
        network = tiny_network(Config(model=ModelConfig(exits=("layer1", "layer2"))), 10).eval()
        network.load_state_dict(checkpoint.load(where.parent.parent)["network"])
        ((images, targets),) = some_digits(DataConfig()).eval_batches("test", 120)
        answers = infer(network, images, Policy.load(where / "policy.yaml"))
        assert answers.exit_index.tolist() == exit_index.tolist()
        correct = int((answers.classes == targets).sum())
        assert (
            abs(correct - 120 * report["test"]["accuracy"])
            <= self.ambiguous(where, exit_index) + 1e-9
        )

    def test_inference_with_exits_taken_agrees_with_the_record(self, measured):
        report, where, exit_index = measured
        live = report["live"]
        assert live["images"] == 120
        assert (
            live["differing_beyond_rounding"]
            <= live["differing"]
            <= self.ambiguous(where, exit_index)
        )
        differing = live["differing"] / 120
        assert abs(live["accuracy"] - report["test"]["accuracy"]) <= differing + 1e-9
        assert 1e-5 <= live["rounding"] <= 4 * ROUNDING  # float32
        assert report["environment"]["runtime"] == "torch"


def test_a_static_network_that_the_runtime_cannot_build_is_left_out(finished, monkeypatch, caplog):
    loaded = load_run(finished, TASK, CPU)
    good, bad = (tiny_network(Config(model=ModelConfig(exits=())), 10).eval() for _ in range(2))
    build = EagerRuntime.network

    def network(self, module, example):
        if module is bad:
            raise RuntimeError("an operation is not supported")
        return build(self, module, example)

    monkeypatch.setattr(EagerRuntime, "network", network)
    assert build_networks(loaded, {"good": good, "bad": bad}) == {"good": good}
    (message,) = caplog.messages
    assert_names(message, "bad", "not supported")


def test_without_a_whole_batch_nothing_is_timed(finished):
    loaded = load_run(finished, TASK, CPU)
    policy = Policy(exit_names=NAMES, thresholds=(0.5, 0.5))
    assert time_batch(loaded, loaded.data, policy, ROWS, 8, 7, {}) is None  # images to time
    assert time_batch(loaded, loaded.data, policy, ROWS, 121, 1000, {}) is None  # images of test


def test_a_batch_larger_than_val_is_timed_without_its_segments(finished, caplog):
    caplog.set_level("INFO")
    loaded = load_run(finished, TASK, CPU)
    policy = Policy(exit_names=NAMES, thresholds=(0.5, 0.5))
    found = time_batch(loaded, loaded.data, policy, ROWS, 110, 1000, {})
    assert found.segments is None
    assert (found.timing.batch_size, found.timing.images) == (110, 110)
    assert_names(caplog.text, "batch 110", "val", loaded.data.size("val"))


def test_the_segments_of_the_policy_are_timed_beside_it(finished):
    loaded = load_run(finished, TASK, CPU)
    policy = Policy(exit_names=NAMES, thresholds=(0.5, 0.5), enabled=(False, True))
    static = tiny_network(Config(model=ModelConfig(exits=())), 10).eval()
    found = time_batch(loaded, loaded.data, policy, ROWS, 2, 2, {"static": static})
    assert set(found.segments.seconds) == {(0, 1), (2, 2)}
    assert (found.segments.batch_size, found.segments.sizes) == (2, (1, 2))
    assert found.timing.networks["static"].total > 0


def test_for_a_choice_the_given_segments_are_timed(finished):
    loaded = load_run(finished, TASK, CPU)
    spans = [(0, 1), (0, 2), (2, 2)]
    times = time_for_choice(loaded, loaded.data, "entropy", 2, spans)
    assert list(times.seconds) == spans
    with pytest.raises(UserError) as caught:
        time_for_choice(loaded, loaded.data, "entropy", 101, spans)
    assert_names(str(caught.value), "val", 100, 101, "--latency-batch")


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.02, 0.0, 0.98), (0.34, 0.33, 0.33)])
def test_every_first_part_of_the_timed_images_takes_the_exits_as_all_do(shares):
    """However they are sorted in the files: here the easy ones come first."""
    exit_index = np.repeat(np.arange(3), np.round(5000 * np.array(shares)).astype(int))
    order = evenly(exit_index)
    assert np.array_equal(np.sort(order), np.arange(len(exit_index)))
    counts = np.cumsum(exit_index[order][:, None] == np.arange(3), axis=0)
    expected = np.arange(1, len(order) + 1)[:, None] * np.array(shares)
    assert abs(counts - expected).max() < 4
    first = order[exit_index[order] == exit_index.max()][:50]  # at one exit: a random sample
    assert len(set(first)) == 50 and (np.diff(first) < 0).sum() > 10


def test_single_images_are_those_of_the_split_in_its_layout(finished):
    data = load_run(finished, TASK, CPU).data
    (images,) = [images for images, _ in data.eval_batches("test", 120)]
    rows = np.array([5, 3, 119, 3, 0])
    first, second = whole_batches(one_by_one(data, "test", rows), 2)  # the last image fills none
    assert torch.equal(torch.cat([first, second]), images[rows[:4]])
    assert first.stride() == images[rows[:2]].stride()
    assert torch.equal(first_batch(data, "test", 32), images[:32])
    assert torch.equal(first_batch(data, "test", 121), images)


class TestUnreadableSinceRecorded:
    """Batches that lack an image."""

    POLICY = Policy(exit_names=NAMES, thresholds=(0.5, 0.5))

    @pytest.fixture
    def short_of(self, finished, monkeypatch):
        """A function that loads the run with batches of a split one image short."""

        def load(short):
            loaded = load_run(finished, TASK, CPU)
            whole = type(loaded.data).eval_batches

            def batches(self, split, *rest):
                for images, targets in whole(self, split, *rest):
                    count = len(images) - (split == short)
                    if count:
                        yield images[:count], targets[:count]

            monkeypatch.setattr(type(loaded.data), "eval_batches", batches)
            return loaded

        return load

    def test_without_a_whole_batch_of_test_nothing_is_timed(self, short_of, caplog):
        loaded = short_of("test")
        assert time_batch(loaded, loaded.data, self.POLICY, ROWS, 4, 8, {}) is None
        assert_names(caplog.text, 4, "readable")

    def test_without_a_whole_batch_of_val_segments_are_not_timed(self, short_of, caplog):
        loaded = short_of("val")
        found = time_batch(loaded, loaded.data, self.POLICY, ROWS, 4, 8, {})
        assert found.segments is None and found.timing.images == 8
        assert_names(caplog.text, "segments", 3, 4, "val")
        with pytest.raises(UserError, match="val"):
            time_for_choice(loaded, loaded.data, "max_prob", 4, [(0, 2)])
