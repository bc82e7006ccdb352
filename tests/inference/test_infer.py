"""Inference with exits taken: what it answers, and what it does not compute."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_close, bound, live_of, refusal, replay, skip_without
from torch import nn

from early_exit.choosing.outcome import ROUNDING, disagreements
from early_exit.choosing.record import score_record
from early_exit.errors import UserError
from early_exit.inference.criteria import CRITERIA
from early_exit.inference.infer import Rows, infer, run_segments
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.segments import segments_of
from early_exit.model.network import MultiExitNetwork, Stage

ROUNDED = 8  # images out of 512 that may lie at a threshold or a tie: three are put there
# Counts are few, so levels stand for thresholds: at the last early exit one agreement is enough
# and before it two are asked for; one is enough; two are asked for.
PATIENCE = {0.3: (2.0, 2.0, 1.0), 0.6: (1.0, 1.0, 1.0), 0.9: (2.0, 2.0, 2.0)}


def make_policy(record, criterion, level=0.6, **changes):
    """Thresholds such that about a share of 1 - `level` of the images reaches each of them.

    Each is the score of some image of the record, as those that are chosen on val are.
    """
    policy = Policy(
        exit_names=record.info.exit_names,
        thresholds=(NEVER,) * (record.logits.shape[1] - 1),
        criterion=criterion,
        temperatures=(0.5, 0.8, 1.0, 1.3),
        **changes,
    )
    if criterion == "patience":
        return dataclasses.replace(policy, thresholds=PATIENCE[level])
    scores = score_record(record, policy).scores[:, :-1]
    chosen = np.quantile(scores, level, axis=0, method="nearest")
    return dataclasses.replace(policy, thresholds=tuple(chosen.tolist()))


def away_from_scores(policy, record):
    """The policy with every threshold halfway down to the next lower score, so that no image lies
    at one."""
    scores = score_record(record, policy).scores[:, :-1].astype(float)
    lower = [
        max(column[column < threshold], default=threshold - 1)
        for column, threshold in zip(scores.T, policy.thresholds, strict=True)
    ]
    middle = (np.array(policy.thresholds) + lower) / 2
    return dataclasses.replace(policy, thresholds=tuple(middle.tolist()))


def run_live(net, images, policy, batch_size):
    """What inference gave, (images,) each, one batch after the other."""
    return live_of(infer(net, some, policy) for some in images.split(batch_size))


def assert_agree(record, policy, live, rounded=ROUNDED):
    """Live inference did what the record says, but for a few images at a threshold."""
    found = disagreements(record, policy, live)
    assert found.rounding == ROUNDING  # float64, rounded to float32 once
    assert found.unexplained.sum() == 0
    assert found.differs.sum() <= rounded


# In float64: what live inference makes of a batch of another size or layout, and of fewer rows
# later on, differs from the record by far less than the 1e-5 that `disagreements` excuses.


@pytest.mark.parametrize("level", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_live_inference_agrees_with_stored_logits(
    exact_net, exact_images, exact_stored, criterion, level
):
    policy = make_policy(exact_stored, criterion, level)
    live = run_live(exact_net, exact_images, policy, 256)
    assert_agree(exact_stored, policy, live)
    # the claim is not empty: images exit wherever they can
    counted = {0.3: {2, 3}, 0.6: {1, 2, 3}, 0.9: {2, 3}}
    assert set(live.exit_index) == (counted[level] if criterion == "patience" else {0, 1, 2, 3})


@pytest.mark.parametrize("enabled", [(False, True, True), (True, False, True), (True, True, False)])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_live_inference_agrees_with_disabled_exits(
    exact_net, exact_images, exact_stored, criterion, enabled
):
    policy = make_policy(exact_stored, criterion, enabled=enabled)
    live = run_live(exact_net, exact_images, policy, 256)
    assert_agree(exact_stored, policy, live)
    assert len(set(live.exit_index)) > 1
    assert enabled.index(False) not in live.exit_index


@pytest.mark.parametrize("criterion", CRITERIA)
def test_live_inference_agrees_in_any_order_and_batch(
    exact_net, exact_images, exact_stored, criterion
):
    policy = make_policy(exact_stored, criterion)
    order = torch.randperm(len(exact_images), generator=torch.Generator().manual_seed(3))
    live = run_live(exact_net, exact_images[order], policy, 100)
    shuffled = exact_stored.subset(order.numpy(), "test", "shuffled")
    assert_agree(shuffled, policy, live)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_live_inference_agrees_in_channels_last(tiny_net, exact_images, exact_stored, criterion):
    policy = make_policy(exact_stored, criterion)
    net = tiny_net.double().to(memory_format=torch.channels_last)
    laid_out = exact_images.to(memory_format=torch.channels_last)
    live = run_live(net, laid_out, policy, 256)
    assert_agree(exact_stored, policy, live)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("count", [100, pytest.param(512, marks=pytest.mark.slow)])
def test_live_inference_agrees_one_image_at_a_time(
    exact_net, exact_images, exact_stored, criterion, count
):
    policy = make_policy(exact_stored, criterion)
    live = run_live(exact_net, exact_images[:count], policy, 1)
    assert_agree(exact_stored.subset(np.arange(count), "test", "some"), policy, live)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_live_inference_agrees_in_float32_away_from_thresholds(
    tiny_net, images, exact_stored, layout
):
    """Each threshold in the middle of the widest gap between the scores around a quantile."""
    policy = make_policy(exact_stored, "max_prob")
    scores = np.sort(score_record(exact_stored, policy).scores[:, :-1], axis=0)
    gaps = np.diff(scores, axis=0)[150:400]
    widest = gaps.argmax(axis=0) + 150
    middle = (scores[widest] + scores[widest + 1]).diagonal() / 2
    policy = dataclasses.replace(policy, thresholds=tuple(middle.tolist()))
    # the sums up to the last early exit: the stem, four convolutions, a linear layer
    terms = 3 * 9 + 3 * 16 * 9 + 32 * 9 + 32 * 16
    # a probability changes at most by half of what the logits do, over the temperature
    size = (abs(exact_stored.logits).max(axis=(0, 2)) / policy.temperatures)[:-1].max()
    assert gaps.max(axis=0).min() / 2 > bound(torch.float32, terms) * size / 2
    net = tiny_net.to(memory_format=layout)
    live = run_live(net, images[:512].to(memory_format=layout), policy, 256)
    assert np.array_equal(live.exit_index, replay(exact_stored, policy).exit_index)
    assert set(live.exit_index) == {0, 1, 2, 3}


def test_answers_are_the_logits_of_the_exit_of_each_image(exact_net, exact_images, exact_stored):
    policy = make_policy(exact_stored, "max_prob")
    answers = infer(exact_net, exact_images[:256], policy)
    scored = score_record(exact_stored, policy).scores
    exit_index = answers.exit_index
    rows = np.arange(256)
    temperatures = torch.tensor(policy.temperatures)[exit_index, None]
    expected = torch.from_numpy(exact_stored.logits[rows, exit_index.numpy()]) / temperatures
    # float32 from the logits on: a rounding, a quotient, and a softmax of four classes
    assert_close(answers.logits, expected, terms=2)
    assert_close(answers.score, torch.from_numpy(scored[rows, exit_index.numpy()]), terms=64)
    assert torch.equal(answers.classes, answers.logits.argmax(dim=-1))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_numpy_arrays_exit_as_tensors_do(exact_net, exact_images, exact_stored, criterion):
    policy, images = make_policy(exact_stored, criterion), exact_images[:64]

    def on_arrays(segment):
        def run(features, temperature, state):
            state = None if state is None else torch.from_numpy(state)
            with torch.inference_mode():
                results = segment(torch.from_numpy(features), temperature, state)
            return tuple(None if part is None else part.numpy() for part in results)

        return run

    segments = [(index, on_arrays(segment)) for index, segment in segments_of(exact_net, policy)]
    found, expected = (
        run_segments(segments, images.numpy(), policy),
        infer(exact_net, images, policy),
    )
    assert len(set(found.exit_index.tolist())) > 1
    for name in ("exit_index", "logits", "score", "classes"):
        assert isinstance(getattr(found, name), np.ndarray)
        assert np.array_equal(getattr(found, name), getattr(expected, name).numpy())


# A network whose every answer is written into its images, for cases worked out by hand.


class Written(nn.Module):
    """Logits (B, 3) of the class that pixel (0, 0, exit_index) holds, ten times larger from 10 on:
    2 is class 2 with a small logit, 12 with a large one."""

    def __init__(self, exit_index: int) -> None:
        super().__init__()
        self.exit_index = exit_index

    def forward(self, features):
        written = features[:, 0, 0, self.exit_index].long()
        size = torch.where(written >= 10, 10.0, 1.0)
        return nn.functional.one_hot(written % 10, 3) * size[:, None]


def scripted(num_exits):
    """What `infer` needs of a network: stages that pass their features on and answer what is
    written there."""
    early = [Stage([nn.Identity()], Written(index)) for index in range(num_exits - 1)]
    names = (*(f"exit{index}" for index in range(num_exits - 1)), "final")
    stages = [*early, Stage([Written(num_exits - 1)], None)]
    return SimpleNamespace(training=False, exit_names=names, stages=stages)


def written(rows):
    """Images (B, 1, 1, N) that hold these answers."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, None]


def test_answers_come_in_the_order_of_the_images():
    net = scripted(3)
    policy = Policy(exit_names=net.exit_names, thresholds=(0.9, 0.9))
    images = written([[0, 1, 2], [11, 2, 0], [0, 12, 1], [2, 1, 10], [10, 1, 1]])
    answers = infer(net, images, policy)
    assert answers.exit_index.tolist() == [2, 0, 1, 2, 0]
    assert answers.classes.tolist() == [2, 1, 2, 0, 0]


def test_patience_follows_its_image_by_hand():
    net = scripted(4)
    policy = Policy(exit_names=net.exit_names, thresholds=(1.0,) * 3, criterion="patience")
    answers = infer(
        net,
        written(
            [
                [0, 0, 1, 1],  # repeats itself at exit 1
                [0, 1, 1, 2],  # at exit 2
                [0, 1, 2, 1],  # never
                [2, 2, 0, 0],  # at exit 1
                [1, 2, 2, 0],  # at exit 2
                [1, 0, 1, 0],  # never
            ]
        ),
        policy,
    )
    assert answers.exit_index.tolist() == [1, 2, 3, 1, 2, 3]
    assert answers.classes.tolist() == [0, 1, 1, 2, 2, 0]


def test_a_count_continues_after_a_disabled_exit():
    net = scripted(4)
    policy = Policy(
        exit_names=net.exit_names,
        thresholds=(1.0,) * 3,
        criterion="patience",
        enabled=(True, False, True),
    )
    # the second exit is disabled: the third repeats the first in row 0, and in row 1 it does not
    answers = infer(net, written([[0, 1, 0, 2], [1, 0, 0, 2]]), policy)
    assert answers.exit_index.tolist() == [2, 3]


def test_a_single_image_is_answered():
    net = scripted(3)
    policy = Policy(exit_names=net.exit_names, thresholds=(0.9, 0.9))
    for row, exit_index, answer in (([10, 1, 2], 0, 0), ([0, 11, 2], 1, 1), ([0, 1, 2], 2, 2)):
        answers = infer(net, written([row]), policy)
        assert answers.exit_index.tolist() == [exit_index]
        assert answers.classes.tolist() == [answer]
        assert answers.logits.shape == (1, 3)
        assert answers.score.shape == (1,)


# A backbone that hands a number through unchanged, so that every row a stage computes is known.


class Numbered(nn.Module):
    """A convolution over all channels but the first, which goes through as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(7, 7, 3, padding=1)

    def forward(self, features):
        return torch.cat([features[:, :1], torch.tanh(self.conv(features[:, 1:]))], dim=1)


class Unnumbered(nn.Module):
    """Pools and classifies all channels but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 3)

    def forward(self, features):
        return self.linear(features[:, 1:].mean(dim=(2, 3)))


@pytest.fixture
def numbered_net():
    """Four exits over blocks that hand the number of an image through."""
    torch.manual_seed(0)
    units = {f"block{index}": Numbered() for index in range(3)} | {"end": Unnumbered()}
    net = MultiExitNetwork(
        nn.Sequential(*units.values()),
        units,
        ["block0", "block1", "block2"],
        num_classes=3,
        example=torch.zeros(1, 8, 4, 4),
        head="linear",
    )
    with torch.no_grad():
        for head in net.heads.values():
            # average and maximum of the first channel's 8x8 cells: no exit sees the number
            head.linear.weight[:, :64] = head.linear.weight[:, 8 * 64 : 9 * 64] = 0
    return net.eval()


@pytest.fixture
def numbered_images():
    """64 images (64, 8, 4, 4) whose first channel is their number."""
    images = torch.randn(64, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    images[:, 0] = torch.arange(64.0)[:, None, None]
    return images


@pytest.fixture
def computed(numbered_net):
    """For every stage, the numbers of the images it was given, one list a call."""
    given = [[] for _ in numbered_net.stages]
    for stage, calls in zip(numbered_net.stages, given, strict=True):
        stage.register_forward_pre_hook(
            lambda _, inputs, calls=calls: calls.append(inputs[0][:, 0, 0, 0].tolist())
        )
    return given


@pytest.mark.parametrize("criterion", CRITERIA)
def test_later_stages_compute_only_the_remaining_rows(
    numbered_net, numbered_images, record_of, criterion
):
    numbered_net, numbered_images = numbered_net.double(), numbered_images.double()
    record = record_of(numbered_net, numbered_images, torch.zeros(64, dtype=torch.int64))
    policy = away_from_scores(make_policy(record, criterion), record)
    given = []
    for stage in numbered_net.stages:
        stage.register_forward_pre_hook(
            lambda _, inputs: given.append(inputs[0][:, 0, 0, 0].tolist())
        )
    infer(numbered_net, numbered_images, policy)
    exit_index = replay(record, policy).exit_index
    remaining = [np.flatnonzero(exit_index >= index).tolist() for index in range(4)]
    assert given == remaining
    assert 0 < len(remaining[3]) < 64  # some exited, some remain


def test_a_trained_nets_stages_compute_as_many_rows_as_remain(tiny_net, images, stored):
    policy = make_policy(stored, "max_prob")
    rows = [0] * 4
    for index, stage in enumerate(tiny_net.stages):

        def count(_, inputs, index=index):
            rows[index] += len(inputs[0])

        stage.register_forward_pre_hook(count)
    live = run_live(tiny_net, images, policy, 256)
    assert rows == [(live.exit_index >= index).sum() for index in range(4)]
    # about a share of 0.4 exits at the first exit, and it is in the record's own order
    assert rows[0] == 2048 and 0 < rows[3] < rows[2] < rows[1] < 2048


def test_no_later_stage_runs_when_all_exit_at_once(numbered_net, numbered_images, computed):
    policy = Policy(exit_names=numbered_net.exit_names, thresholds=(0.0, 0.9, 0.9))
    answers = infer(numbered_net, numbered_images, policy)
    assert [len(calls) for calls in computed] == [1, 0, 0, 0]
    assert answers.exit_index.tolist() == [0] * 64


def test_every_stage_computes_every_row_when_no_exit_is_taken(
    numbered_net, numbered_images, computed
):
    policy = Policy(exit_names=numbered_net.exit_names, thresholds=(NEVER,) * 3)
    answers = infer(numbered_net, numbered_images, policy)
    assert computed == [[list(range(64))]] * 4
    assert answers.exit_index.tolist() == [3] * 64
    with torch.no_grad():
        whole = numbered_net.backbone(numbered_images)
    # four layers, of at most 7 * 9 terms; tanh and the average of 16 pixels between them
    assert_close(answers.logits, whole, terms=400)


def test_heads_of_disabled_exits_never_run(numbered_net, numbered_images):
    policy = Policy(
        exit_names=numbered_net.exit_names,
        thresholds=(0.0, 0.0, NEVER),
        enabled=(False, False, True),
    )
    ran = []
    for name, head in numbered_net.heads.items():
        head.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    answers = infer(numbered_net, numbered_images, policy)
    assert ran == ["block2"]
    assert answers.exit_index.tolist() == [3] * 64


def test_no_row_exits_at_a_disabled_exit(numbered_net, numbered_images):
    policy = Policy(
        exit_names=numbered_net.exit_names, thresholds=(0.0, 0.0, 0.0), enabled=(False, True, True)
    )
    assert infer(numbered_net, numbered_images, policy).exit_index.tolist() == [1] * 64


def test_remaining_rows_stay_channels_last(tiny_net, images, stored):
    net = tiny_net.to(memory_format=torch.channels_last)
    layouts = []
    for stage in net.stages:
        stage.register_forward_pre_hook(
            lambda _, inputs: layouts.append(
                inputs[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
    policy = make_policy(stored, "max_prob")
    infer(net, images[:256].to(memory_format=torch.channels_last), policy)
    assert layouts == [True] * 4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_selecting_rows_keeps_layout_and_state(memory_format):
    features = torch.randn(5, 4, 3, 3).to(memory_format=memory_format)
    rows = Rows(torch.arange(10, 15), features, torch.arange(10).reshape(5, 2))
    some = rows.select(torch.tensor([3, 0]))
    assert some.index.tolist() == [13, 10]
    assert some.state.tolist() == [[6, 7], [0, 1]]
    assert torch.equal(some.features, features[[3, 0]])
    assert some.features.is_contiguous(memory_format=memory_format)


def test_selecting_rows_without_state_keeps_none():
    rows = Rows(torch.arange(2), torch.zeros(2, 1, 1, 1))
    assert rows.select(torch.tensor([1])).state is None


def test_a_network_in_training_mode_is_refused(tiny_net, images):
    policy = Policy(exit_names=tiny_net.exit_names, thresholds=(0.5,) * 3)
    with pytest.raises(UserError, match=r"eval\(\)"):
        infer(tiny_net.train(), images[:2], policy)


def test_a_policy_for_other_exits_is_refused(tiny_net, images):
    policy = Policy(exit_names=("layer1", "final"), thresholds=(0.5,))
    message = refusal(infer, tiny_net, images[:2], policy)
    assert "layer1, final" in message and "stem, layer1, layer2, final" in message


def test_inference_changes_nothing_in_the_network(tiny_net, images, stored):
    before = {name: value.clone() for name, value in tiny_net.state_dict().items()}
    given = images[:64].clone()
    infer(tiny_net, given, make_policy(stored, "max_prob"))
    assert all(torch.equal(value, before[key]) for key, value in tiny_net.state_dict().items())
    assert torch.equal(given, images[:64])


def test_the_network_runs_in_the_given_precision(tiny_net, images, stored):
    skip_without(torch.bfloat16)
    seen = []
    tiny_net.stages[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    never = Policy(exit_names=tiny_net.exit_names, thresholds=(NEVER,) * 3)
    answers = infer(
        tiny_net, images[:8], never, lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    assert seen == [torch.bfloat16]
    assert answers.logits.dtype == answers.score.dtype == torch.float32
