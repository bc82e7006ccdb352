"""Segments: stages between enabled exits run as one, and a disabled exit costs nothing."""

import pytest
import torch
from helpers import assert_close, bound
from torch import nn

from early_exit.errors import UserError
from early_exit.inference.criteria import CRITERIA, apply_criterion, declare, get_traits
from early_exit.inference.infer import infer
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.segments import segments_of
from early_exit.model.network import FINAL

NAMES = ("stem", "layer1", "layer2", FINAL)


def policy_with(enabled, **fields):
    return Policy(exit_names=NAMES, thresholds=(NEVER,) * 3, enabled=enabled, **fields)


@pytest.mark.parametrize(
    ("enabled", "ends", "lengths"),
    [
        ((True, True, True), [0, 1, 2, 3], [1, 1, 1, 1]),
        ((False, True, False), [1, 3], [2, 2]),
        ((False, False, True), [2, 3], [3, 1]),
        ((False, False, False), [3], [4]),
    ],
)
def test_stages_are_merged_where_exits_are_disabled(make_net, enabled, ends, lengths):
    net = make_net().eval()
    segments = segments_of(net, policy_with(enabled))
    assert [exit_index for exit_index, _ in segments] == ends
    assert [len(segment.stages) for _, segment in segments] == lengths
    assert [stage for _, segment in segments for stage in segment.stages] == net.stages


def test_the_head_of_a_disabled_exit_is_never_called(make_net):
    net, called = make_net().eval(), []
    for name, head in net.heads.items():
        head.register_forward_hook(lambda *_, name=name: called.append(name))
    infer(net, torch.randn(4, 3, 16, 16), policy_with((False, True, False)))
    assert called == ["layer1"]


def test_a_segment_is_its_stages_one_after_the_other(make_net):
    net, images = make_net().double().eval(), torch.randn(5, 3, 16, 16, dtype=torch.float64)
    ((_, segment), _) = segments_of(net, policy_with((False, True, False), criterion="entropy"))
    with torch.no_grad():
        features, logits, answer, score, state = segment(images, 2.0)
        expected, _ = net.stages[0](images)
        expected, expected_logits = net.stages[1](expected)
    assert torch.equal(features, expected) and torch.equal(logits, expected_logits)
    assert state is None and score.dtype == torch.float32
    slow = (expected_logits.float() / 2).log_softmax(dim=1)
    # a softmax of four classes, its logarithm, and a sum of four products
    assert_close(score, (slow.exp() * slow).sum(dim=1), terms=32)
    assert torch.equal(answer, expected_logits.float() / 2)


def test_a_state_reaches_the_next_enabled_exit(make_net):
    net, images = make_net().eval(), torch.randn(6, 3, 16, 16)
    policy = policy_with((True, False, True), criterion="patience")
    (_, first), (_, second), _ = segments_of(net, policy)
    with torch.no_grad():
        features, logits, _, score, state = first(images, 1.0, None)
        _, later, _, count, _ = second(features, 1.0, state)
    assert score.tolist() == [0.0] * 6
    assert count.tolist() == (logits.argmax(1) == later.argmax(1)).float().tolist()


class TestTraits:
    def test_one_that_declares_nothing_has_the_defaults(self, monkeypatch):
        monkeypatch.setitem(CRITERIA, "mine", lambda logits, state: (logits, logits[:, 0], None))
        traits = get_traits("mine")
        assert not traits.keeps_state and not traits.counts and traits.min_early_exits == 1

    def test_a_state_must_be_declared(self, monkeypatch):
        def mine(logits, state=None):
            return logits, logits[:, 0], torch.zeros(len(logits))

        monkeypatch.setitem(CRITERIA, "mine", mine)
        with pytest.raises(UserError, match="mine"):
            apply_criterion("mine", torch.zeros(2, 3), 1.0, None)
        monkeypatch.setitem(CRITERIA, "mine", declare(keeps_state=True)(mine))
        assert apply_criterion("mine", torch.zeros(2, 3), 1.0, None)[2].shape == (2,)

    def test_enough_exits_are_asked_for_by_declaration(self, monkeypatch):
        needs_three = declare(min_early_exits=3)(lambda logits, state: (logits, logits[:, 0], None))
        monkeypatch.setitem(CRITERIA, "mine", needs_three)
        policy_with((True, True, True), criterion="mine")
        with pytest.raises(UserError, match=r"mine.* 3 "):
            policy_with((True, True, False), criterion="mine")

    def test_scores_lie_in_the_declared_range(self):
        """But for rounding: a probability of a float32 softmax may be an epsilon above 1."""
        logits = 10 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
        rounded = bound(torch.float32, 32)
        for name in CRITERIA:
            traits = get_traits(name)
            _, score, _ = apply_criterion(name, logits, 1.0, None)
            low, high = traits.range(num_classes=5, early_exits=1)
            assert low - rounded <= float(score.min())
            assert float(score.max()) <= high + rounded


def test_linear_stages_need_no_network_class():
    class Bare:
        exit_names, stages = (FINAL,), [nn.Identity()]

    assert len(segments_of(Bare(), Policy(exit_names=(FINAL,), thresholds=()))) == 1
