"""CUDA graphs: buckets, padding and buffers, with a function in the place of a graph; real graphs
where there is a GPU."""

import dataclasses

import pytest
import torch
from helpers import bound
from torch import nn

from early_exit.inference.infer import infer
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.cudagraph import CudaGraphRuntime, GraphRows, bucket_of
from early_exit.inference.runtimes.network import RuntimeNetwork

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def tensors(tree):
    """The tensors of a nest of tuples."""
    if isinstance(tree, tuple):
        return [tensor for part in tree for tensor in tensors(part)]
    return [] if tree is None else [tree]


class Recorder:
    """Captures as CUDA graphs do: a replay reads the same inputs and writes the same outputs. Keeps
    the outputs of every capture and counts the replays."""

    def __init__(self):
        self.outputs, self.replays = [], 0

    def __call__(self, function):
        outputs = function()
        self.outputs.append(tensors(outputs))

        def replay():
            self.replays += 1
            for output, value in zip(tensors(outputs), tensors(function()), strict=True):
                output.copy_(value)

        return replay, outputs


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def fake_runtime(monkeypatch, recorder):
    """The runtime on the CPU, with the recorder in the place of CUDA."""
    monkeypatch.setattr(CudaGraphRuntime, "_capture", lambda _, function: recorder(function))
    return CudaGraphRuntime("cudagraph", "f32", CPU)


def test_buckets_are_the_powers_of_two_and_what_lies_halfway():
    buckets = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    expected = [min(bucket for bucket in buckets if bucket >= rows) for rows in range(1, 129)]
    assert [bucket_of(rows) for rows in range(1, 129)] == expected


def test_each_bucket_is_captured_once(recorder):
    run = GraphRows(lambda features, *_: features + 1, recorder)
    for rows in (5, 6, 5, 8, 7, 1):
        features = torch.randn(rows, 2)
        assert torch.equal(run(features), features + 1)
    assert [len(outputs[0]) for outputs in recorder.outputs] == [6, 8, 1]
    assert recorder.replays == 6


def test_a_network_without_exits_gets_no_rows_that_it_does_not_need(fake_runtime, recorder):
    """They would cost it more than they cost exits: it runs whole batches, of one size."""
    network = nn.Linear(2, 3)
    run = fake_runtime.network(network, None)
    images = torch.randn(5, 2)
    with torch.inference_mode():
        assert torch.equal(run(images), network(images))
    assert [len(output) for (output,) in recorder.outputs] == [5]


def test_rows_that_fill_a_bucket_are_ignored(recorder):
    run = GraphRows(lambda features, *_: features.cumsum(0), recorder)  # by the row before it
    run(torch.full((8, 2), 100.0))
    assert run(torch.ones(5, 2))[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert run(torch.ones(7, 2))[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_no_buffer_is_handed_out(recorder):
    def function(features, _, state):
        return (features, (features + 1, features + 2)), state + 1

    run = GraphRows(function, recorder)
    first = tensors(run(torch.zeros(3), 1.0, torch.zeros(3)))
    kept = [tensor.clone() for tensor in first]
    run(torch.ones(3), 1.0, torch.ones(3))
    assert all(map(torch.equal, first, kept))
    (graph,) = run.graphs.values()
    buffers = {tensor.data_ptr() for tensor in (*recorder.outputs[0], *graph.inputs)}
    assert buffers.isdisjoint(tensor.data_ptr() for tensor in first)


def test_what_is_passed_in_is_not_changed(recorder):
    run = GraphRows(lambda features, *_: features.add_(1), recorder)
    features = torch.zeros(4)
    assert run(features).tolist() == [1, 1, 1, 1]
    assert features.tolist() == [0, 0, 0, 0]


def test_temperature_and_state_are_those_of_the_call(recorder):
    run = GraphRows(lambda features, temperature, state: features / temperature + state, recorder)
    state = torch.tensor([1, 2, 3])
    assert run(torch.tensor([8.0, 8.0, 8.0]), 2.0, state).tolist() == [5, 6, 7]
    assert run(torch.tensor([8.0, 8.0, 8.0]), 4.0, 10 * state).tolist() == [12, 22, 32]
    assert len(recorder.outputs) == 1


def test_features_may_be_several_maps(recorder):
    run = GraphRows(lambda features, *_: (features[::-1], features[0].sum(1)), recorder)
    features = torch.randn(5, 3), torch.randn(5, 2, 4, 4).to(memory_format=torch.channels_last)
    (second, first), total = run(features)
    assert torch.equal(first, features[0]) and torch.equal(second, features[1])
    assert second.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(total, features[0].sum(1))


def test_a_later_change_of_the_network_has_no_effect(fake_runtime, tiny_net, images):
    run = fake_runtime.network(tiny_net.backbone, images[:2])
    with fake_runtime.context():
        before = run(images[:2])
        with torch.no_grad():
            for weights in tiny_net.parameters():
                weights.zero_()
        assert torch.equal(run(images[:2]), before)


@pytest.mark.parametrize("criterion", ["max_prob", "patience"])
def test_inference_is_that_of_the_padded_rows(fake_runtime, exact_net, exact_images, criterion):
    """In float64, where another number of rows changes no digit of float32."""
    net, thresholds = exact_net, (0.5,) * 3 if criterion == "max_prob" else (2.0, 1.0, 1.0)
    policy = Policy(exit_names=net.exit_names, thresholds=thresholds, criterion=criterion)
    run = RuntimeNetwork(net, fake_runtime, exact_images[:2])
    for rows in (1, 7, 33):
        found, expected = (
            run.infer(exact_images[:rows], policy),
            infer(net, exact_images[:rows], policy),
        )
        assert found.exit_index.tolist() == expected.exit_index.tolist()
        assert found.classes.tolist() == expected.classes.tolist()
    assert len(set(found.exit_index.tolist())) > 1


def test_weights_are_converted_once(fake_runtime, tiny_net):
    """To the type that autocast would convert them to in every replay; the rest stays float32."""
    runtime = dataclasses.replace(fake_runtime, precision="bf16")
    network = runtime._convert(tiny_net.backbone)
    assert network.conv1.weight.dtype == torch.bfloat16
    assert network.bn1.weight.dtype == tiny_net.backbone.conv1.weight.dtype == torch.float32


@needs_gpu
class TestGpu:
    @pytest.mark.parametrize("precision", ["f32", "bf16", "fp16"])
    def test_answers_are_those_of_later_calls_too(self, tiny_net, images, precision):
        """Each result equals a second run's after many other graphs of the same memory ran."""
        runtime = CudaGraphRuntime("cudagraph", precision, torch.device("cuda"))
        run = RuntimeNetwork(tiny_net.cuda(), runtime, images[:2].cuda())
        policy = Policy(exit_names=tiny_net.exit_names, thresholds=(0.5,) * 3)
        sizes = (1, 7, 33, 5, 64, 2, 33)
        answers = [run.infer(images[:rows], policy) for rows in sizes]
        for rows, answer in zip(sizes, answers, strict=True):
            again = run.infer(images[:rows], policy)
            assert torch.equal(again.logits, answer.logits)
            assert torch.equal(again.exit_index, answer.exit_index)

    def test_logits_are_those_of_eager_torch(self, tiny_net, images):
        net = tiny_net.cuda().double()  # so that another algorithm changes no digit of float32
        runtime = CudaGraphRuntime("cudagraph", "f32", torch.device("cuda"))
        run = RuntimeNetwork(net, runtime, images[:2].cuda().double())
        with torch.no_grad():
            expected = torch.stack(net(images[:33].cuda().double()), dim=1).cpu()
        found = torch.stack(run(images[:33].double()), dim=1).cpu()
        limit = bound(torch.float32, 1) * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= limit

    def test_only_the_choice_of_rows_waits_for_the_device(self, tiny_net, images):
        runtime = CudaGraphRuntime("cudagraph", "f32", torch.device("cuda"))
        segment = RuntimeNetwork(tiny_net.cuda(), runtime, images[:2].cuda()).segment(
            0, 0, "max_prob"
        )
        some = runtime.array(images[:5])
        with runtime.context():
            segment(some, 1.0, None)  # captures
            torch.cuda.set_sync_debug_mode("error")
            try:
                segment(some, 2.0, None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
