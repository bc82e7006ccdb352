"""The comparison of exported segments with the network's, on segments that need no export."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import Engine, assert_names, in_torch, refusal

from early_exit.inference.criteria import apply_criterion
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.runtimes.onnx_check import ELEMENTWISE, check_segments, work
from early_exit.inference.segments import segments_of


@pytest.fixture
def policy(tiny_net):
    """All exits enabled, with a threshold in the middle of the scores."""
    return Policy(exit_names=tiny_net.exit_names, thresholds=(0.5,) * 3)


def as_exported(network, policy, change=lambda index, parts: parts):
    """The network's segments on numpy arrays, as a runtime gives them. change: what it makes of
    the results (features, logits, answer, score, state) of the segment that ends at exit index."""

    def run(index, segment):
        def call(features, temperature, state):
            state = None if state is None else torch.from_numpy(state)
            with torch.no_grad():
                parts = segment(torch.from_numpy(features), temperature, state)
            return change(index, [None if part is None else part.numpy() for part in parts])

        return call

    return [(index, run(index, segment)) for index, segment in segments_of(network, policy)]


def check(network, policy, images, change=lambda index, parts: parts):
    """Compares the network with its own segments after a change."""
    exported = as_exported(network, policy, change)
    reference = in_torch(network, images[:2])
    return check_segments(reference, policy, exported, images[:64], images[:64].numpy())


@pytest.mark.parametrize("criterion", ["max_prob", "patience"])
def test_the_same_segments_agree(tiny_net, policy, images, criterion):
    policy = dataclasses.replace(policy, criterion=criterion)
    found = check(tiny_net, policy, images)
    assert (found.images, found.largest_difference, found.other_exits) == (64, 0, 0)
    assert found.from_float is None


@pytest.mark.parametrize(("index", "name"), [(0, "stem"), (2, "layer2"), (3, "final")])
def test_other_logits_are_named(tiny_net, policy, images, index, name):
    def change(at, parts):
        parts[1] = parts[1] * (1.01 if at == index else 1)
        return parts

    assert_names(refusal(check, tiny_net, policy, images, change), name, "logits")


def test_logits_that_are_not_numbers_are_refused(tiny_net, policy, images):
    def change(_, parts):
        parts[1] = parts[1] * np.float32(np.nan)
        return parts

    assert_names(refusal(check, tiny_net, policy, images, change), "logits", "nan")


def test_other_scores_are_refused(tiny_net, policy, images):
    def change(_, parts):
        parts[3] = parts[3] * np.float32(0.99)
        return parts

    assert_names(refusal(check, tiny_net, policy, images, change), "scores", "max_prob")


def test_another_exit_is_refused(tiny_net, policy, images):
    """Features that are right for all images together and wrong for some of them, as of a model
    that does not take any number of rows: with the right logits and scores for the former."""

    def change(at, parts):
        if at == 1 and len(parts[3]) not in (1, 7, 64):
            parts[3] = 1 - parts[3]
        return parts

    assert_names(refusal(check, tiny_net, policy, images, change), "exit", 64)


@pytest.mark.parametrize(("rows", "named"), [(1, "1 image"), (7, "7 images")])
def test_a_segment_that_is_wrong_with_few_images_is_refused(tiny_net, policy, images, rows, named):
    def change(at, parts):
        if at == 2 and len(parts[1]) == rows:
            parts[1] = parts[1] * np.float32(1.01)
        return parts

    assert_names(refusal(check, tiny_net, policy, images, change), "layer2", named)


def test_a_segment_that_fails_with_one_image_is_refused(tiny_net, policy, images):
    """As if it had been traced for more."""

    def change(at, parts):
        if at == 2 and len(parts[1]) == 1:
            raise RuntimeError("a dimension of 1,\nexpected 2")
        return parts

    message = refusal(check, tiny_net, policy, images, change)
    assert_names(message, "layer2", "1 image ", "expected 2")


def test_a_segment_that_gives_another_number_of_rows_is_refused(tiny_net, policy, images):
    def change(at, parts):
        if at == 2 and len(parts[1]) == 1:
            parts[1] = parts[1].repeat(2, axis=0)
        return parts

    assert_names(refusal(check, tiny_net, policy, images, change), "layer2", "1 image ", "(2, ")


def test_a_score_within_rounding_of_its_threshold_may_exit_elsewhere(tiny_net, policy, images):
    """One score is its threshold, and a little less in the exported segments."""
    with torch.no_grad():
        score = segments_of(tiny_net, policy)[0][1](images[:64], 1.0, None)[3].numpy()
    threshold = float(np.sort(score)[32])
    policy = dataclasses.replace(policy, thresholds=(threshold, *policy.thresholds[1:]))

    def change(at, parts):
        parts[3] = np.nextafter(parts[3], np.float32(0)) if at == 0 else parts[3]
        return parts

    assert check(tiny_net, policy, images, change).other_exits == 1


@dataclasses.dataclass(frozen=True)
class Coarse(Engine):
    """Stands for a runtime in 8-bit integers: the logits of its segments are off by one percent."""

    def segment(self, segment, _example):
        """The segment, its logits off."""

        def call(features, temperature, state):
            features, logits, *_ = segment(features, temperature, state)
            logits = 1.01 * logits
            return features, logits, *apply_criterion(segment.criterion, logits, temperature, state)

        return call


class TestIntegers:
    """The reference computes in 8-bit integers."""

    def check(self, network, policy, images, factor):
        """Compares segments whose logits are torch's, multiplied, with those of `Coarse`."""

        def change(at, parts):
            logits = torch.from_numpy(parts[1] * np.float32(factor))
            answer, score, _ = policy.score(at, logits, None)
            return [parts[0], logits.numpy(), answer.numpy(), score.numpy(), None]

        reference = RuntimeNetwork(network, Coarse(), images[:2])
        exported = as_exported(network, policy, change)
        return check_segments(reference, policy, exported, images[:64], images[:64].numpy())

    def test_the_same_rounding_agrees(self, tiny_net, policy, images):
        found = self.check(tiny_net, policy, images, 1.01)
        # the largest logit is 1.01 times that of torch
        assert found.from_float == pytest.approx(0.01 / 1.01, rel=1e-3)
        assert found.tolerance == pytest.approx(found.from_float / 2, rel=1e-3)
        assert found.largest_difference < found.tolerance / 100

    @pytest.mark.parametrize("factor", [1.0, 1.02])
    def test_another_rounding_is_refused(self, tiny_net, policy, images, factor):
        """Float32 itself, and what is off by as much again."""
        message = refusal(self.check, tiny_net, policy, images, factor)
        assert_names(message, "engine-int8", "stem", "logits")


def test_work_counts_the_terms_along_one_path(tiny_net):
    """The stem: a convolution of 3x3x3 terms and an exit whose linear layer adds its inputs."""
    stage = tiny_net.stages[0]
    modules = [*stage.body.modules(), *stage.head.modules()]
    terms = 27 + stage.head.linear.in_features
    assert work(tiny_net, 0) == terms + ELEMENTWISE * len(modules)
    assert work(tiny_net, 1) > work(tiny_net, 0) - stage.head.linear.in_features
