"""The energy estimate, against numbers worked out by hand."""

import pytest
import torch
from torch import nn

from early_exit.model.cost import network_cost
from early_exit.model.energy import PICOJOULES, Energy, estimate
from early_exit.model.network import MultiExitNetwork
from imagenet import networks


@pytest.fixture(scope="module")
def network() -> MultiExitNetwork:
    """A 3x3 convolution from 3 to 8 channels on 4x4, and linear layers; an exit between them,
    with a linear head on pooled features."""
    units = {
        "conv": nn.Conv2d(3, 8, 3, padding=1),
        "end": nn.Sequential(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    }
    return MultiExitNetwork(
        nn.Sequential(*units.values()),
        units,
        ["conv"],
        num_classes=10,
        head="mixed_pool",
        example=torch.zeros(1, 3, 4, 4),
    )


MAC, SRAM, DRAM = 3.7 + 0.9, 2.5, 162.5  # pJ of a multiply-add, and of a byte


def test_the_table_is_horowitz_s():
    assert PICOJOULES["float32 multiplication"] + PICOJOULES["float32 addition"] == MAC
    assert PICOJOULES["byte of SRAM"] == SRAM
    assert PICOJOULES["byte of DRAM"] == DRAM


@pytest.mark.parametrize(("weights", "byte"), [("DRAM", DRAM), ("SRAM", SRAM)])
def test_stages_and_heads_by_hand(network, weights, byte):
    found = estimate(network, network_cost(network))[weights]
    # 3456 MACs; reads 48 and writes 128 numbers; 216 weights and 8 biases
    assert found.stages[0] == pytest.approx(
        3456 * MAC + 4 * (48 + 128) * SRAM + 4 * (216 + 8) * byte
    )
    # 8192 + 640 MACs; 128 + 64 and 64 + 10 numbers; two layers' weights and biases
    assert found.stages[1] == pytest.approx(
        (8192 + 640) * MAC + 4 * (192 + 74) * SRAM + 4 * (8192 + 64 + 640 + 10) * byte
    )
    # on 4x4 pools: 128 to 10, and the mixture's one number
    assert found.heads == (
        pytest.approx(1280 * MAC + 4 * (128 + 10) * SRAM + 4 * (1280 + 10 + 1) * byte),
        0.0,
    )


@pytest.mark.parametrize("arch", ["resnet18", "vit_b_16"])
def test_the_stages_weights_are_the_networks(arch):
    """A ViT's class token and position embedding too."""
    with torch.device("meta"):
        net = networks.build_network(arch, ())
    estimates = estimate(net, network_cost(net))
    dram, sram = estimates["DRAM"], estimates["SRAM"]
    weights = (dram.plain - sram.plain) / 4 / (DRAM - SRAM)
    assert round(weights) == sum(p.numel() for p in net.backbone.parameters())


@pytest.mark.parametrize("named", [False, True])
def test_attention_reads_and_writes_what_its_projections_do(named):
    units = {"attend": Attend(named), "end": nn.Sequential(nn.Flatten(), nn.Linear(5 * 8, 2))}
    net = MultiExitNetwork(
        nn.Sequential(*units.values()), units, [], num_classes=2, example=torch.zeros(1, 5, 8)
    )
    cost = network_cost(net)
    found = estimate(net, cost)["SRAM"]
    values = 6 * 40 + 40 + 2  # in, three times out, in, out; the linear layer
    weights = 8 * 24 + 24 + 8 * 8 + 8 + 80 + 2
    assert found.plain == pytest.approx(cost.plain_macs * MAC + 4 * (values + weights) * SRAM)


class Attend(nn.Module):
    """One layer of attention on tokens (B, 5, 8)."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.attention, self.named = nn.MultiheadAttention(8, 2, batch_first=True), named

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.named:
            same = {"query": tokens, "key": tokens, "value": tokens}
            return self.attention(**same, need_weights=False)[0]
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def test_an_image_costs_all_that_ran():
    energy = Energy((10.0, 20.0, 30.0), (1.0, 2.0, 0.0))
    assert energy.plain == 60
    assert energy.cumulative() == (11, 33, 63)
    assert energy.cumulative((False, True)) == (10, 32, 62)
