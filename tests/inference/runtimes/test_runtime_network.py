"""The examples that segments are built with."""

from contextlib import nullcontext

import torch
from helpers import assert_close, refusal

from early_exit.inference.runtimes import network as module
from early_exit.inference.runtimes.network import RuntimeNetwork


class Noting:
    """A runtime in integers, on the CPU, that keeps the examples it is given."""

    name, precision, slow_to_build, context = "engine-int8", "int8", False, nullcontext

    def __init__(self):
        self.examples = []

    def segment(self, segment, example):
        self.examples.append(example)
        return segment


def test_an_example_for_integers_runs_a_few_rows_at_a_time(tiny_net, images, monkeypatch):
    """All of its rows reach every stage, in their order and memory layout."""
    net, rows = tiny_net.to(memory_format=torch.channels_last), []
    some = images[:70].to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, _ = net.stages[0](some, with_logits=False)
    first = net.stages[0]

    def forward(features, with_logits=True, original=first.forward):
        rows.append(len(features))
        return original(features, with_logits)

    monkeypatch.setattr(first, "forward", forward)
    runtime = Noting()
    RuntimeNetwork(net, runtime, some).segment(1, 1, "max_prob")
    (example,) = runtime.examples
    assert rows == [32, 32, 6] and module.EXAMPLE_ROWS == 32
    assert_close(example.features, expected, terms=9 * 3 + 4)  # a convolution and BatchNorm
    assert example.features.is_contiguous(memory_format=torch.channels_last)


def test_a_network_in_training_mode_is_refused(tiny_net, images):
    message = refusal(RuntimeNetwork, tiny_net.train(), Noting(), images[:2])
    assert "network.eval()" in message
