"""Inference on a stream: the answers of `infer`, batch by batch, with later segments run full."""

from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_close, refusal, require_precision
from hypothesis import given
from hypothesis import strategies as st

from early_exit import infer_stream
from early_exit.choosing.record import score_record
from early_exit.errors import UserError
from early_exit.inference.criteria import CRITERIA
from early_exit.inference.infer import Rows, infer, run_segments
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.runtimes.eager import EagerRuntime
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.segments import spans
from early_exit.inference.stream import SegmentQueue, Stream, stream_segments

CYCLE = (3, 1, 8, 2, 5)  # sizes of varying batches


class Scripted:
    """A segment that takes what it answers from its features (B, 1 + N): the number of the row, and
    a 1 for each exit at which the row exits. Everything is a small integer, so results are exact.

    The state is the row's number, and so are both columns of the answer but for the exit's index.
    """

    def __init__(self, exit_index, as_tuple=False):
        self.exit_index, self.as_tuple = exit_index, as_tuple
        self.calls = []
        """The numbers of the rows, one list a call."""

    def __call__(self, features, temperature, state):
        maps = features if isinstance(features, tuple) else (features, features)
        numbers = maps[0][:, 0]
        assert numbers.tolist() == maps[1][:, 0].tolist()
        assert state is None or state.tolist() == numbers.tolist()
        self.calls.append(numbers.tolist())
        answer = maps[1][:, :2] * 1
        answer[:, 1] = self.exit_index
        given = maps if self.as_tuple else maps[0]
        return given, answer, answer, maps[0][:, 1 + self.exit_index], numbers

    @property
    def sizes(self):
        """The rows of each call."""
        return [len(call) for call in self.calls]


def script(exits, num_exits=3, **options):
    """Segments, a policy, and the features (rows, 1 + N) of rows that exit at the given exits."""
    names = (*(f"exit{index}" for index in range(num_exits - 1)), "final")
    policy = Policy(exit_names=names, thresholds=(0.5,) * (num_exits - 1))
    features = np.zeros((len(exits), 1 + num_exits), np.float32)
    features[:, 0] = np.arange(len(exits))
    features[np.arange(len(exits)), 1 + np.array(exits, int)] = 1
    return [(index, Scripted(index, **options)) for index in range(num_exits)], policy, features


def cut(rows, sizes):
    """Consecutive batches of these sizes, as many as the rows fill."""
    ends = [0, *(end for end in accumulate(sizes) if end <= len(rows))]
    return [rows[begin:end] for begin, end in pairwise(ends)]


def assert_equal_answers(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("logits", "exit_index", "score"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert type(ours) is type(theirs) and ours.dtype == theirs.dtype
            assert ours.tolist() == theirs.tolist()


def run_each(segments, batches, policy):
    """The answers of `run_segments`, one batch after the other."""
    return [run_segments(segments, images, policy) for images in batches]


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 8])
@pytest.mark.parametrize("sizes", [(1,), (3,), (8,), CYCLE])
def test_answers_equal_those_of_each_batch(sizes, batch_size, convert, as_tuple):
    exits = np.random.default_rng(0).choice(4, size=95, p=(0.4, 0.2, 0.2, 0.2))
    segments, policy, features = script(exits, 4, as_tuple=as_tuple)
    batches = [convert(batch) for batch in cut(features, sizes * 95)]
    answers = list(stream_segments(segments, batches, policy, batch_size=batch_size))
    assert_equal_answers(answers, run_each(segments, batches, policy))
    found = np.concatenate([answer.logits for answer in answers])
    assert np.array_equal(found, np.stack([np.arange(len(found)), exits[: len(found)]], axis=1))


@given(
    exits=st.lists(st.integers(0, 2), max_size=60),
    sizes=st.lists(st.integers(1, 9), min_size=60, max_size=60),
    batch_size=st.integers(1, 9),
    max_ahead=st.integers(1, 3),
    waits=st.lists(st.integers(0, 3), min_size=60, max_size=60),
)
def test_answers_equal_those_of_each_batch_however_it_is_cut(
    exits, sizes, batch_size, max_ahead, waits
):
    segments, policy, features = script(exits)
    batches, now = cut(features, sizes), iter(accumulate(waits))
    time = SimpleNamespace(now=0)

    def arriving():
        for batch in batches:
            time.now = next(now)
            yield batch

    options = {"batch_size": batch_size, "max_ahead": max_ahead, "max_wait": 4}
    answers = stream_segments(segments, arriving(), policy, clock=lambda: time.now, **options)
    assert_equal_answers(list(answers), run_each(segments, batches, policy))


def test_later_segments_run_full_until_the_stream_ends():
    exits = np.random.default_rng(1).choice(3, size=400, p=(0.5, 0.3, 0.2))
    segments, policy, features = script(exits)
    list(stream_segments(segments, cut(features, [8] * 50), policy))
    (_, first), (_, second), (_, last) = segments
    assert first.sizes == [8] * 50
    for segment, reached in ((second, (exits >= 1).sum()), (last, (exits >= 2).sum())):
        full, partial = divmod(int(reached), 8)
        assert segment.sizes == [8] * full + [partial] * (partial > 0)
        assert full > 5
    assert np.array_equal(np.concatenate(last.calls), np.flatnonzero(exits == 2))


def test_the_latest_full_segment_runs_first():
    segments, policy, features = script([2, 2, 2, 2, 2, 2])
    order = []
    for index, segment in enumerate(segments):
        segments[index] = (
            index,
            lambda *given, run=segment[1], index=index: (
                order.append((index, len(given[0]))),
                run(*given),
            )[1],
        )
    list(stream_segments(segments, cut(features, [2, 4]), policy))
    assert order == [(0, 2), (1, 2), (2, 2), (0, 4), (1, 2), (2, 2), (1, 2), (2, 2)]


def test_a_batch_is_given_out_once_it_and_those_before_are_answered():
    #                                   0     1     2     3     4
    segments, policy, features = script([0, 1, 0, 0, 1, 0, 0, 0, 2, 0])
    read = []

    def batches():
        for batch in cut(features, [2] * 5):
            read.append(int(batch[0, 0]) // 2)
            yield batch

    given = []
    for answers in stream_segments(segments, batches(), policy):
        given.append((read[-1], answers.logits[:, 0].tolist(), answers.exit_index.tolist()))
    assert given == [
        (2, [0, 1], [0, 1]),  # row 1 waited until row 4 came
        (2, [2, 3], [0, 0]),  # held back for it
        (2, [4, 5], [1, 0]),
        (3, [6, 7], [0, 0]),
        (4, [8, 9], [2, 0]),
    ]


def test_fewer_than_a_batch_of_rows_wait_for_each_segment():
    exits = np.random.default_rng(2).choice(4, size=600, p=(0.3, 0.3, 0.2, 0.2))
    segments, policy, features = script(exits, 4)
    stream, most = Stream(segments, policy, batch_size=8), [0] * 4
    for batch in cut(features, CYCLE * 20):
        stream.put(batch)
        for _ in stream.run(torch.inference_mode):
            pass
        waiting = [len(queue) for queue in stream.queues]
        most = [max(pair) for pair in zip(most, waiting, strict=True)]
    assert most == [0, 7, 7, 7]


def test_few_answers_are_held_back_for_a_row_that_waits():
    segments, policy, features = script([2] + [0] * 99)
    read = []
    batches = (read.append(len(read)) or batch for batch in cut(features, [2] * 50))
    next(stream_segments(segments, batches, policy, max_ahead=3))
    assert len(read) == 4  # more than 3 batches of 2 rows since row 0 came
    assert segments[2][1].calls == [[0]]


def test_rows_wait_no_longer_than_the_deadline():
    segments, policy, features = script([1, 0, 2, 0, 0, 0, 0, 0])
    time = SimpleNamespace(now=0.0)

    def batches():
        for batch, now in zip(cut(features, [2] * 4), (0.0, 2.0, 4.9, 5.0), strict=True):
            time.now = now
            yield batch

    options = {"batch_size": 3, "max_wait": 5.0, "clock": lambda: time.now}
    given = [time.now for _ in stream_segments(segments, batches(), policy, **options)]
    # row 0 is computed 5 seconds after it came, and row 2 with it, which then waits for itself
    assert segments[1][1].calls == [[0, 2]]
    assert given == [5.0] * 4


def test_a_row_beyond_the_deadline_waits_for_no_later_segment_either():
    segments, policy, features = script([2, 0, 0, 0])
    time = SimpleNamespace(now=0.0)

    def batches():
        for time.now in (0.0, 5.0):
            yield features[:2] if time.now == 0 else features[2:]
        time.now = 100.0

    stream = stream_segments(segments, batches(), policy, max_wait=5.0, clock=lambda: time.now)
    assert next(stream).exit_index.tolist() == [2, 0]
    assert time.now == 5.0


def test_an_empty_stream_gives_no_answers():
    segments, policy, _ = script([])
    assert list(stream_segments(segments, [], policy)) == []


def test_a_single_batch_is_answered_as_by_itself():
    segments, policy, features = script([2, 0, 1, 2, 0])
    (answers,) = stream_segments(segments, [features], policy)
    assert answers.exit_index.tolist() == [2, 0, 1, 2, 0]
    assert [segment.sizes for _, segment in segments] == [[5], [3], [2]]


def test_without_exits_every_batch_is_answered_at_once():
    segments, policy, features = script([0] * 6, num_exits=1)
    read = []
    batches = (read.append(1) or batch for batch in cut(features, [1, 2, 3]))
    assert [len(read) for _ in stream_segments(segments, batches, policy)] == [1, 2, 3]
    assert segments[0][1].sizes == [1, 2, 3]


def test_disabled_exits_have_no_queue():
    _, policy, features = script([2, 3, 0, 3] * 4, num_exits=4)
    policy = replace(policy, enabled=(False, False, True))
    segments = [(last, Scripted(last)) for _, last in spans(policy.enabled)]
    answers = list(stream_segments(segments, cut(features, [4] * 4), policy))
    assert [answer.exit_index.tolist() for answer in answers] == [[2, 3, 3, 3]] * 4
    assert [segment.sizes for _, segment in segments] == [[4] * 4, [4] * 3]


def test_nothing_is_read_before_and_after_the_caller_asks():
    segments, policy, features = script([0] * 6)
    read = []
    batches = (read.append(1) or batch for batch in cut(features, [2] * 3))
    stream = stream_segments(segments, batches, policy)
    assert read == []
    next(stream)
    stream.close()
    assert read == [1] and list(stream) == []


def test_a_lower_bound_of_the_oldest_row_is_enough(monkeypatch):
    """On a GPU the number of the oldest row is not read."""
    exits = np.random.default_rng(3).choice(3, size=200, p=(0.5, 0.3, 0.2))
    segments, policy, features = script(exits)
    batches = cut(features, [4] * 50)
    expected = run_each(segments, batches, policy)
    monkeypatch.setattr(SegmentQueue, "oldest", property(lambda self: self._parts[0][1]))
    assert_equal_answers(list(stream_segments(segments, batches, policy, max_ahead=4)), expected)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_ahead": 0}])
def test_sizes_below_one_are_refused_at_once(options):
    segments, policy, _ = script([])
    (name,) = options
    assert name in refusal(stream_segments, segments, [], policy, **options)


def test_an_empty_batch_is_refused():
    segments, policy, features = script([0, 0])
    with pytest.raises(UserError, match="no images"):
        list(stream_segments(segments, [features, features[:0]], policy))


# The queue of a segment.


def rows_of(*numbers, layout=torch.contiguous_format):
    """Rows with maps (R, 4, 2, 2) and a state that hold their numbers."""
    index = torch.tensor(numbers)
    features = index.float()[:, None, None, None].repeat(1, 4, 2, 2)
    return Rows(index, features.to(memory_format=layout), torch.stack([index, index], dim=1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_queue_gives_rows_in_order_in_their_layout(layout):
    queue = SegmentQueue(0, Scripted(0))
    for numbers in ((2, 5), (6,), (7, 8, 9)):
        queue.put(rows_of(*numbers, layout=layout))
    taken = []
    for count, left in ((1, 5), (3, 2), (8, 0)):
        rows = queue.take(count)
        taken.append(rows.index.tolist())
        assert len(queue) == left
        assert rows.features[:, 3, 1, 1].tolist() == taken[-1]
        assert rows.state.tolist() == [[number] * 2 for number in taken[-1]]
        assert rows.features.is_contiguous(memory_format=layout)
    assert taken == [[2], [5, 6, 7], [8, 9]]


def test_a_queue_gives_a_batch_that_came_as_one_without_a_copy():
    queue, rows = SegmentQueue(0, Scripted(0)), rows_of(0, 1, 2)
    queue.put(rows)
    assert queue.take(3) is rows


# A network.


def make_policy(record, criterion, **changes):
    """Thresholds in the middle of the widest gap around the 60 % quantile of the scores, which no
    rounding crosses; of counts, 1."""
    num_exits = record.logits.shape[1]
    policy = Policy(
        exit_names=record.info.exit_names,
        thresholds=(NEVER,) * (num_exits - 1),
        criterion=criterion,
        temperatures=(0.5, 0.8, 1.0, 1.3),
    )
    if criterion == "patience":
        return replace(policy, thresholds=(1.0, 1.0, 1.0), **changes)
    scores = np.sort(score_record(record, policy).scores[:, :-1].astype(float), axis=0)
    around = scores[len(scores) // 2 : 7 * len(scores) // 10]
    widest = np.diff(around, axis=0).argmax(axis=0)
    columns = np.arange(num_exits - 1)
    middle = (around[widest, columns] + around[widest + 1, columns]) / 2
    return replace(policy, thresholds=tuple(middle.tolist()), **changes)


@pytest.mark.parametrize("enabled", [(True, True, True), (False, True, True)])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_network_answers_as_infer_does(exact_net, exact_images, exact_stored, criterion, enabled):
    policy = make_policy(exact_stored, criterion, enabled=enabled)
    batches = cut(exact_images[:95], CYCLE * 5)
    found = list(infer_stream(exact_net, batches, policy, batch_size=8))
    expected = [infer(exact_net, images, policy) for images in batches]
    assert len(found) == len(expected) == 25
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.exit_index, other.exit_index)
        # float32 from the logits on, which are equal to it: a quotient, and a softmax of four
        assert_close(one.logits, other.logits, terms=2)
        assert_close(one.score, other.score, terms=64)
    assert len({*torch.cat([answers.exit_index for answers in found]).tolist()}) > 1


def test_later_stages_stay_channels_last(tiny_net, images, exact_stored):
    net = tiny_net.to(memory_format=torch.channels_last)
    given = []
    for stage in net.stages[1:]:
        stage.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    batches = images[:96].to(memory_format=torch.channels_last).split(16)
    list(infer_stream(net, batches, make_policy(exact_stored, "max_prob"), batch_size=12))
    assert {len(features) for features in given} > {12}
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in given)


def test_the_caller_is_not_in_inference_mode(tiny_net, images, exact_stored):
    require_precision("bf16")
    modes = []
    tiny_net.stages[1].register_forward_pre_hook(
        lambda *_: modes.append(
            (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        )
    )
    stream = infer_stream(
        tiny_net,
        images[:64].split(16),
        make_policy(exact_stored, "max_prob"),
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    for _ in stream:
        assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
    assert set(modes) == {(True, True)}


def test_a_network_in_training_mode_is_refused_at_once(tiny_net):
    policy = Policy(exit_names=tiny_net.exit_names, thresholds=(0.5,) * 3)
    with pytest.raises(UserError, match=r"eval\(\)"):
        infer_stream(tiny_net.train(), [], policy)


def test_a_policy_for_other_exits_is_refused_at_once(tiny_net):
    policy = Policy(exit_names=("layer1", "final"), thresholds=(0.5,))
    assert "layer1, final" in refusal(infer_stream, tiny_net, [], policy)


def test_a_network_in_a_runtime_answers_as_infer_does(tiny_net, images, exact_stored):
    policy = make_policy(exact_stored, "patience")
    network = RuntimeNetwork(
        tiny_net, EagerRuntime("torch", "f32", torch.device("cpu")), images[:2]
    )
    check_runtime(network, images[:48].split(16), policy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "package, criterion", [("onnxruntime", "patience"), ("openvino", "max_prob")]
)
def test_deployed_segments_answer_as_infer_does(tiny_net, images, exact_stored, package, criterion):
    pytest.importorskip(package)
    pytest.importorskip("onnxscript")
    from early_exit.inference.runtimes.onnxruntime import OnnxRuntime
    from early_exit.inference.runtimes.openvino import OpenVINORuntime

    runtime = {"onnxruntime": OnnxRuntime, "openvino": OpenVINORuntime}[package](threads=1)
    policy = make_policy(exact_stored, criterion)
    check_runtime(RuntimeNetwork(tiny_net, runtime, images[:2]), images[:48].split(16), policy)


def check_runtime(network, batches, policy):
    """The exits of `infer`, and its classes, in float32; more than one exit is taken."""
    found = list(network.infer_stream(batches, policy, batch_size=8))
    expected = [network.infer(batch, policy) for batch in batches]
    assert [one.exit_index.tolist() for one in found] == [
        one.exit_index.tolist() for one in expected
    ]
    assert [one.classes.tolist() for one in found] == [one.classes.tolist() for one in expected]
    assert len({number for one in found for number in one.exit_index.tolist()}) > 1
