"""The joint loss, and the two ways of giving its weights."""

import math

import pytest
import torch
from helpers import assert_close, bound
from hypothesis import given
from hypothesis import strategies as st

from early_exit.errors import UserError
from early_exit.model.losses import joint_loss, resolve_weights, weights_at

EVEN = [[0.0, 0.0]]  # probabilities 1/2, 1/2
LEANING = [[math.log(3), 0.0]]  # probabilities 3/4, 1/4
FIRST = torch.tensor([0])
# Two or three sums of two classes' exponentials and logarithms in float32, and a difference of two
# losses that is a sixth of them.
ROUNDED = bound(torch.float32, 6 * 24)


def test_no_weights_weigh_every_exit_alike():
    assert resolve_weights(None, 3) == (1.0, 1.0, 1.0)


def test_one_weight_per_exit_is_used_as_given():
    assert resolve_weights([0.3, 0.3, 2], 3) == (0.3, 0.3, 2.0)


def test_with_one_weight_fewer_the_final_exit_gets_the_rest_to_one():
    assert resolve_weights([0.25, 0.5], 3) == (0.25, 0.5, 0.25)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, (0.01, 0.01, 1.0)),
        (0.5, (0.08, 0.155, 1.0)),
        (1.0, (0.15, 0.3, 1.0)),
    ],
)
def test_early_weights_rise_evenly_from_a_start(progress, expected):
    assert weights_at((0.15, 0.3, 1.0), 0.01, progress) == pytest.approx(expected)


def test_without_a_start_they_are_constant():
    assert weights_at((0.15, 1.0), None, 0.2) == (0.15, 1.0)


def test_a_weight_below_the_start_is_constant():
    assert weights_at((0.0, 0.005, 1.0), 0.01, 0.5) == (0.0, 0.005, 1.0)


def test_the_plain_network_needs_no_weight():
    assert resolve_weights([], 1) == (1.0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_early_weights_either_sum_to_one_with_the_rest_or_are_refused(early):
    if sum(early) >= 1:
        with pytest.raises(UserError):
            resolve_weights(early, len(early) + 1)
    elif sum(early) < 1 - 1e-6:
        weights = resolve_weights(early, len(early) + 1)
        assert weights[:-1] == tuple(early)
        assert weights[-1] > 0
        assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize(
    "weights, match",
    [
        ([1], r"\b1\b.*\b3\b"),
        ([1, 1, 1, 1], r"\b4\b.*\b3\b"),
        ([0.5, -0.1], "0.5 -0.1"),
        ([0.5, math.nan, 1], "nan"),
        ([0.5, math.inf, 1], "inf"),
        ([0.5, 0.5], r"\b0\b"),
        ([0.9, 0.6], r"-0\.5\b"),
        ([0, 0, 0], r"\b0\b"),
    ],
)
def test_weights_that_mean_nothing_are_refused_in_one_line(weights, match):
    with pytest.raises(UserError, match=match) as error:
        resolve_weights(weights, 3)
    assert "\n" not in str(error.value)


def test_early_weights_that_sum_to_one_are_refused_whatever_their_rounding():
    # 0.7 + 0.2 + 0.1 is 1 - 2 ** -53 in binary: no rest that anybody asked for
    with pytest.raises(UserError):
        resolve_weights([0.7, 0.2, 0.1], 4)


def test_joint_loss_is_the_weighted_sum_of_cross_entropies():
    loss = joint_loss([torch.tensor(EVEN), torch.tensor(LEANING)], FIRST, (1.0, 2.0))
    # ln 2 of the even exit, twice ln 4/3 of the leaning one
    assert loss.item() == pytest.approx(math.log(2) + 2 * math.log(4 / 3), rel=ROUNDED)


def test_joint_loss_with_early_weights_alone():
    weights = resolve_weights([0.25], 2)  # 0.25 and 0.75
    loss = joint_loss([torch.tensor(EVEN), torch.tensor(LEANING)], FIRST, weights)
    expected = 0.25 * math.log(2) + 0.75 * math.log(4 / 3)
    assert loss.item() == pytest.approx(expected, rel=ROUNDED)


def test_joint_loss_is_the_mean_over_the_batch():
    logits = torch.tensor(LEANING * 2)
    loss = joint_loss([logits], torch.tensor([0, 1]), (1.0,))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=ROUNDED)


def test_label_smoothing_moves_mass_to_all_classes():
    # 0.2 of the mass over two classes: 0.9 on the target, 0.1 on the other
    loss = joint_loss([torch.tensor(LEANING)], FIRST, (1.0,), label_smoothing=0.2)
    expected = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    assert loss.item() == pytest.approx(expected, rel=ROUNDED)


def test_an_exit_of_weight_zero_gets_no_gradient():
    early = torch.tensor(EVEN, requires_grad=True)
    final = torch.tensor(LEANING, requires_grad=True)
    joint_loss([early, final], FIRST, (1.0, 0.0)).backward()
    assert early.grad is not None
    assert final.grad is None


def test_as_many_logits_as_weights_are_expected():
    with pytest.raises(ValueError):
        joint_loss([torch.tensor(EVEN)], FIRST, (1.0, 1.0))


def test_loss_is_computed_in_float32_whatever_the_logits_are():
    logits = torch.tensor(LEANING, dtype=torch.bfloat16)
    assert joint_loss([logits, logits], FIRST, (1.0, 1.0), distill=1.0).dtype == torch.float32


def test_distillation_by_hand():
    logits = [torch.tensor(EVEN), torch.tensor(LEANING)]
    plain = joint_loss(logits, FIRST, (0.5, 1.0))
    taught = joint_loss(logits, FIRST, (0.5, 1.0), distill=2.0, distill_temperature=1.0)
    # KL(teacher || student) = 3/4 ln (3/4 / 1/2) + 1/4 ln (1/4 / 1/2), times weight 0.5 times 2
    distance = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert (taught - plain).item() == pytest.approx(distance, rel=ROUNDED)


def test_distillation_softens_both_sides_and_keeps_the_gradients_size():
    teacher = torch.tensor([[2 * math.log(3), 0.0]])  # at temperature 2: 3/4 and 1/4
    student = torch.tensor([[0.0, 2 * math.log(3)]])  # at temperature 2: 1/4 and 3/4
    plain = joint_loss([student, teacher], FIRST, (1.0, 1.0))
    taught = joint_loss([student, teacher], FIRST, (1.0, 1.0), distill=1.0, distill_temperature=2.0)
    # KL = 3/4 ln 3 + 1/4 ln 1/3 = 1/2 ln 3, times the temperature squared
    assert (taught - plain).item() == pytest.approx(4 * 0.5 * math.log(3), rel=ROUNDED)


def test_distillation_is_the_mean_over_the_batch():
    one = [torch.tensor(EVEN), torch.tensor(LEANING)]
    three = [logits.repeat(3, 1) for logits in one]
    alone = joint_loss(one, FIRST, (1.0, 1.0), distill=1.0)
    together = joint_loss(three, FIRST.repeat(3), (1.0, 1.0), distill=1.0)
    # three rows instead of one; logarithms and exponentials of two classes
    assert_close(together, alone, terms=64)


def test_distillation_gives_the_teacher_no_gradient():
    gradients = {}
    for distill in (0.0, 1.0):
        early = torch.tensor(EVEN, requires_grad=True)
        final = torch.tensor(LEANING, requires_grad=True)
        joint_loss([early, final], FIRST, (1.0, 1.0), distill=distill).backward()
        gradients[distill] = (early.grad, final.grad)
    assert torch.equal(gradients[0.0][1], gradients[1.0][1])
    assert not torch.equal(gradients[0.0][0], gradients[1.0][0])  # the student does learn


def test_distillation_from_a_teacher_of_weight_zero_still_teaches():
    # the frozen regime: the final exit is not trained, but says what it knows
    logits = [torch.tensor(EVEN), torch.tensor(LEANING)]
    taught = joint_loss(logits, FIRST, (1.0, 0.0), distill=1.0, distill_temperature=1.0)
    distance = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert taught.item() == pytest.approx(math.log(2) + distance, rel=ROUNDED)


def test_a_teacher_teaches_every_exit():
    logits = [torch.tensor(EVEN), torch.tensor(EVEN)]
    plain = joint_loss(logits, FIRST, (0.5, 1.0))
    taught = joint_loss(
        logits,
        FIRST,
        (0.5, 1.0),
        distill_temperature=1.0,
        teacher=torch.tensor(LEANING),
        teacher_weight=2.0,
    )
    distance = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert (taught - plain).item() == pytest.approx(2.0 * 1.5 * distance, rel=ROUNDED)
