"""Features that are a tuple of maps, from the network to inference, costs and latency."""

import functools

import numpy as np
import pytest
import torch
from helpers import assert_close, in_torch, replay
from torch import nn

from early_exit.inference.infer import infer
from early_exit.inference.latency import measure
from early_exit.inference.policy import NEVER, Policy
from early_exit.inference.segment_times import all_spans, segment_times
from early_exit.model.checks import check_network
from early_exit.model.cost import network_cost
from early_exit.model.energy import estimate
from early_exit.model.features import describe_shape, select_rows, shape_of
from early_exit.model.heads import HEADS, build_head
from early_exit.model.network import MultiExitNetwork

CLASSES, SIDE = 4, 8


class TwoScales(nn.Module):
    """Images (B, 3, 8, 8) to maps of 4 channels at full and at half resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, padding=1)
        self.coarse = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, images):
        return self.fine(images), self.coarse(images)


class Mix(nn.Module):
    """Both maps, the coarse one with a strided convolution of the fine one added."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, maps):
        fine, coarse = maps
        return torch.relu(self.fine(fine)), torch.relu(coarse + self.down(fine))


class Classify(nn.Module):
    """The coarse map to logits (B, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, maps):
        return self.linear(maps[-1].mean(dim=(2, 3)))


@pytest.fixture
def network():
    """A two-scale network with exits after its first two units, in float64."""
    torch.manual_seed(0)
    units = {"scales": TwoScales(), "mix1": Mix(), "mix2": Mix(), "classifier": Classify()}
    backbone = nn.Sequential(*units.values())
    built = MultiExitNetwork(
        backbone,
        units,
        ["scales", "mix1"],
        head=["conv", "mixed_pool"],
        num_classes=CLASSES,
        example=torch.zeros(1, 3, SIDE, SIDE),
    )
    return built.double().eval()


@pytest.fixture
def images():
    """Forty images in float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)


def test_rows_are_selected_in_every_map():
    maps = torch.arange(6).reshape(3, 2), torch.arange(3).reshape(3, 1)
    first, second = select_rows(maps, torch.tensor([2, 0]))
    assert first.tolist() == [[4, 5], [0, 1]] and second.tolist() == [[2], [0]]
    (array,) = select_rows((np.arange(3),), np.array([True, False, True]))
    assert array.tolist() == [0, 2]
    assert select_rows(torch.arange(4), slice(2)).tolist() == [0, 1]


def test_shapes_are_named():
    maps = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4, 4)
    assert shape_of(maps) == ((1, 4, 8, 8), (1, 4, 4, 4))
    assert describe_shape(maps) == "((1, 4, 8, 8), (1, 4, 4, 4))"
    assert describe_shape(maps[1]) == "(1, 4, 4, 4)"
    assert describe_shape("nothing") == "str"


def test_the_network_passes_its_checks(network):
    check_network(network.float())


def test_a_head_reads_the_last_map_unless_it_says_otherwise(monkeypatch):
    class First(nn.Module):
        reads = 0

        def __init__(self, channels, num_classes):
            super().__init__()
            self.channels = channels

        def forward(self, features):
            return features

    maps = torch.zeros(1, 4, 8, 8), torch.zeros(1, 6, 4, 4)
    for kind in (First, functools.partial(First)):
        monkeypatch.setitem(HEADS, "first", kind)
        head = build_head("first", shape_of(maps), CLASSES)
        assert head[1].channels == 4 and head(maps).shape == (1, 4, 8, 8)
    head = build_head("conv", shape_of(maps), CLASSES)
    assert head[1][0].in_channels == 6 and head(maps).shape == (1, CLASSES)


def test_the_plain_network_is_the_last_exit(network, images):
    with torch.no_grad():
        # three layers of at most 4 channels and 3x3 kernels, and the average of 16 pixels
        assert_close(network(images)[-1], network.backbone(images), terms=3 * 2 * 36 + 16 + 4)


def test_live_inference_agrees_with_stored_logits(network, images, make_record):
    with torch.no_grad():
        logits = torch.stack(network(images), dim=1)
    record = make_record(logits.float(), np.zeros(len(images)), exit_names=network.exit_names)
    blank = Policy(exit_names=network.exit_names, thresholds=(NEVER, NEVER))
    thresholds = []
    for index in range(2):
        _, score, _ = blank.score(index, logits[:, index])
        low, high = score.sort().values[[20, 21]].tolist()  # between two scores: half of them exit
        thresholds.append((low + high) / 2)
    policy = Policy(exit_names=network.exit_names, thresholds=tuple(thresholds))
    answers, stored = infer(network, images, policy), replay(record, policy)
    assert set(answers.exit_index.tolist()) >= {0, 2}
    assert answers.exit_index.tolist() == stored.exit_index.tolist()
    assert answers.classes.tolist() == stored.answers.tolist()


def test_multiply_adds_by_hand(network):
    cost = network_cost(network.float())
    fine, coarse = 8 * 8, 4 * 4
    scales = 9 * 3 * 4 * (fine + coarse)
    mix = 9 * 4 * 4 * (fine + coarse)
    assert cost.stage_macs == (scales, mix, mix + 4 * CLASSES)
    # on the coarse map: a 3x3 convolution of stride 2 and a linear layer; a linear layer on 4x4
    assert cost.head_macs == (9 * 4 * 4 * 4 + 4 * CLASSES, 4 * 16 * CLASSES, 0)


def test_energy_and_latency_are_measured(network, images):
    network.float()
    assert all(part > 0 for part in estimate(network, network_cost(network))["SRAM"].stages)
    policy = Policy(exit_names=network.exit_names, thresholds=(0.3, 0.3))
    running = in_torch(network, images[:2].float())
    timing = measure(running, [images.float()], policy, repeats=1)
    assert timing.images == 40 and len(timing.segment_seconds) == 3
    pairs = all_spans((0, 1), 3)
    times = segment_times(running, images[:4].float(), "max_prob", pairs, repeats=3)
    assert times.sizes == (1, 2, 4) and len(times.seconds) == 6


def test_a_shape_may_be_a_plain_tuple():
    assert build_head("conv", (1, 16, 8, 8), CLASSES)(torch.zeros(2, 16, 8, 8)).shape == (
        2,
        CLASSES,
    )
