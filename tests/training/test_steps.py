"""The inner loops: tallies, steps."""

import contextlib
import copy
import math
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from helpers import assert_close
from torch import nn

from early_exit.config import OptimConfig
from early_exit.model.losses import joint_loss
from early_exit.training.optimizer import make_optimizer
from early_exit.training.steps import (
    Tally,
    score_batches,
    set_training_mode,
    train_steps,
)

CPU = torch.device("cpu")


def optim(**changes):
    """Settings without warm-up."""
    return OptimConfig(**{"epochs": 100, "lr": 0.8, "warmup_epochs": 0, **changes})


def test_a_first_step_that_fp16_skips_leaves_no_momentum():
    """Uninitialised memory holds NaN here; elsewhere it may hold anything."""
    line = nn.Linear(2, 1)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty_like(line.weight).isnan().all()
        optimizer = make_optimizer(line, optim(momentum=0.9, weight_decay=0))
        scaler = torch.amp.GradScaler("cpu", enabled=True)
        before = line.weight.detach().clone()
        for scale in (math.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(scale * line(torch.ones(1, 2)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            if scale == math.inf:
                assert torch.equal(line.weight, before)
    finally:
        torch.use_deterministic_algorithms(False)
    rate = optimizer.param_groups[0]["lr"]
    # the layer and its gradient, the scale and back, a product, a difference: ten roundings each
    assert_close(line.weight.detach(), before - rate, terms=60)


def run_steps(forward, batches, loss_fn, optimizer, rates, tally):
    """`train_steps` in float32, to its end; how often it yielded."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    steps = train_steps(
        forward, batches, loss_fn, optimizer, scaler, contextlib.nullcontext, rates, tally
    )
    return sum(1 for _ in steps)


class Line(nn.Module):
    """One weight: returns `weight * x`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[2.0]]))

    def forward(self, x):
        return [x @ self.weight]


def mean_of_first(logits, target):
    """A loss whose gradient is the mean of the inputs."""
    return logits[0].mean()


def test_a_step_follows_its_learning_rate_by_hand():
    line = Line()
    batches = [(torch.tensor([[x]]), torch.tensor([0])) for x in (1.0, 3.0)]
    optimizer = make_optimizer(line, optim(momentum=0, weight_decay=0))
    yielded = run_steps(line, batches, mean_of_first, optimizer, [0.5, 0.1], Tally(1, CPU))
    assert yielded == 2
    assert line.weight.item() == pytest.approx(2 - 0.5 * 1 - 0.1 * 3)


def test_weight_decay_and_momentum_by_hand():
    line = Line()
    batches = [(torch.tensor([[1.0]]), torch.tensor([0]))] * 2
    optimizer = make_optimizer(line, optim(momentum=0.5, weight_decay=0.1))
    run_steps(line, batches, mean_of_first, optimizer, [1.0, 1.0], Tally(1, CPU))
    # velocity 1 + 0.1 * 2 = 1.2, weight 0.8; velocity 0.5 * 1.2 + 1 + 0.08 = 1.68
    assert line.weight.item() == pytest.approx(0.8 - 1.68)


def test_gradients_of_one_step_are_gone_in_the_next():
    line = Line()
    line.weight.grad = torch.tensor([[100.0]])
    batches = [(torch.tensor([[1.0]]), torch.tensor([0]))]
    optimizer = make_optimizer(line, optim(momentum=0, weight_decay=0))
    run_steps(line, batches, mean_of_first, optimizer, [1.0], Tally(1, CPU))
    assert line.weight.item() == pytest.approx(1.0)


@pytest.fixture
def batches(images, targets):
    """Three batches of 32."""
    return list(zip(images[:96].split(32), targets[:96].split(32), strict=True))


def train_net(net, batches, frozen, weights=(1.0, 1.0, 1.0, 1.0)):
    """Three steps."""
    set_training_mode(net, frozen)
    optimizer = make_optimizer(net, optim(weight_decay=0.1))
    loss_fn = partial(joint_loss, weights=weights)
    run_steps(net, batches, loss_fn, optimizer, [0.1] * 3, Tally(net.num_exits, CPU))


def test_a_frozen_backbone_does_not_move_by_a_bit(make_net, batches):
    net = make_net(head="conv")
    before = copy.deepcopy(net.state_dict())
    train_net(net, batches, frozen=True, weights=(1.0, 1.0, 1.0, 0.0))
    for name, value in net.state_dict().items():
        # parameters and buffers alike; of the heads all move, their BatchNorm's counts too
        assert torch.equal(value, before[name]) is name.startswith("backbone."), name


def test_an_unfrozen_backbone_is_trained_whole(make_net, batches):
    net = make_net(head="conv")
    set_training_mode(net, True)  # an earlier phase
    before = copy.deepcopy(net.state_dict())
    train_net(net, batches, frozen=False)
    for name, value in net.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_training_mode_leaves_only_a_frozen_backbone_in_eval_mode(make_net):
    net = make_net()
    set_training_mode(net, True)
    assert not any(module.training for module in net.backbone.modules())
    assert all(module.training for module in net.heads.modules())
    set_training_mode(net, False)
    assert all(module.training for module in net.modules())


def test_training_lowers_the_loss(make_net, batches):
    net, losses = make_net(), []
    for _ in range(4):
        set_training_mode(net, False)
        tally = Tally(4, CPU)
        run_steps(
            net,
            batches,
            partial(joint_loss, weights=(1.0,) * 4),
            make_optimizer(net, optim(momentum=0)),
            [0.05] * 3,
            tally,
        )
        losses.append(tally.read()[0])
    assert losses[-1] < losses[0]


def test_scoring_counts_all_images_and_changes_nothing(tiny_net, batches, stored):
    before = copy.deepcopy(tiny_net.state_dict())
    tally = Tally(4, CPU)
    loss_fn = partial(joint_loss, weights=(1.0,) * 4)
    yielded = list(score_batches(tiny_net, batches, loss_fn, contextlib.nullcontext, tally))
    right = (stored.logits[:96].argmax(-1) == stored.targets[:96, None]).mean(0)
    assert len(yielded) == tally.batches == 3
    assert tally.images == 96
    assert tally.read()[1] == pytest.approx(right.tolist(), abs=1 / 96)
    assert all(torch.equal(value, before[key]) for key, value in tiny_net.state_dict().items())
    assert not any(p.grad is not None for p in tiny_net.parameters())


def add(tally, loss, right, count):
    """A batch of `count` images, of which every exit answers so many rightly."""
    logits = []
    for number in right:
        exit_logits = torch.zeros(count, 2)
        exit_logits[:number, 0] = 1
        exit_logits[number:, 1] = 1
        logits.append(exit_logits)
    tally.add(torch.tensor(loss), logits, torch.zeros(count, dtype=torch.int64))


def test_a_tally_weighs_batches_by_their_size():
    tally = Tally(2, CPU)
    add(tally, 1.0, (1, 2), 4)
    add(tally, 4.0, (2, 0), 2)
    loss, accuracy = tally.read()
    assert loss == pytest.approx((4 * 1.0 + 2 * 4.0) / 6)
    assert accuracy == pytest.approx([3 / 6, 2 / 6])


def test_an_empty_tally_reads_as_nothing():
    assert Tally(2, CPU).read() == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_tally_keeps_the_first_step_that_was_not_finite(bad):
    tally = Tally(1, CPU)
    seen = []
    for loss in (1.0, bad, 1.0, math.nan):
        add(tally, loss, (1,), 2)
        seen.append(int(tally.bad_batch))
    assert seen == [-1, 1, 1, 1]


def test_a_tally_continues_from_its_state():
    whole, first, second = Tally(2, CPU), Tally(2, CPU), Tally(2, CPU)
    for tally in (whole, first):
        add(tally, 0.1 + 0.2, (1, 2), 3)
    second.load_state_dict(first.state_dict())
    for tally in (whole, second):
        add(tally, 1 / 3, (0, 1), 5)
    assert second.read() == whole.read()  # to the last bit
    assert second.state_dict() == whole.state_dict()
    assert (second.images, second.batches) == (8, 2)


def test_a_tallys_state_is_plain_values():
    tally = Tally(2, CPU)
    add(tally, 0.5, (1, 2), 2)
    assert tally.state_dict() == {
        "images": 2,
        "steps": 1,
        "loss": 1.0,
        "correct": [1, 2],
        "among5": [0, 0],
    }


def test_several_micro_batches_are_one_step_of_the_whole_batch():
    """A mean over the whole batch is the mean over its equal parts."""
    torch.manual_seed(0)
    images = torch.randn(12, 3, 4, 4, dtype=torch.float64)
    target = torch.randint(5, (12,))

    def learn(micro_batches):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).double()
        parts = zip(images.split(6 // micro_batches), target.split(6 // micro_batches), strict=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        tally = Tally(1, CPU)
        ended = list(
            train_steps(
                lambda images: [net(images)],
                parts,
                lambda logits, target: torch.nn.functional.cross_entropy(logits[0], target),
                optimizer,
                torch.amp.GradScaler("cpu", enabled=False),
                nullcontext,
                [0.5, 0.1],
                tally,
                micro_batches,
            )
        )
        assert ended == ([False] * (micro_batches - 1) + [True]) * 2
        return net[1].weight, tally.read()

    (whole, read), (parts, same) = learn(1), learn(3)
    # two steps of 48 inputs, 5 classes and 6 images, the second of which magnifies the first
    assert_close(whole, parts, terms=2 * 2 * (48 + 5 + 6 + 16))
    assert same == (pytest.approx(read[0]), read[1])


def test_gradients_are_averaged_with_the_last_micro_batch_alone():
    sent, inside = [], []

    @contextmanager
    def no_sync():
        inside.append(True)
        yield
        inside.pop()

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2))
    net[1].weight.register_hook(lambda _: sent.append(not inside))
    batches = [(torch.randn(2, 3, 1, 1), torch.tensor([0, 1]))] * 6
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    list(
        train_steps(
            lambda images: [net(images)],
            batches,
            lambda logits, _: logits[0].sum(),
            optimizer,
            torch.amp.GradScaler("cpu", enabled=False),
            nullcontext,
            [0.1] * 2,
            Tally(1, CPU),
            3,
            no_sync,
        )
    )
    assert sent == [False, False, True] * 2


def test_many_classes_are_counted_among_five():
    tally = Tally(1, CPU)
    logits = torch.arange(12.0).flip(0).repeat(3, 1)  # classes in the order of their logits
    tally.add(torch.tensor(0.0), [logits], torch.tensor([0, 4, 5]))
    assert tally.read()[1] == [1 / 3] and tally.top5() == [2 / 3]
    few = Tally(1, CPU)
    few.add(torch.tensor(0.0), [logits[:, :10]], torch.tensor([0, 4, 5]))
    assert few.top5() == []
