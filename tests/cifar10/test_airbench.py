"""The shallow wide network: its whitening, what of it is trained, its multiply-adds by hand."""

import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.nn import functional as F

from cifar10.airbench import EPS, IMAGES, Airbench
from cifar10.networks import build_network
from early_exit.model.cost import network_cost


@pytest.fixture(scope="module")
def smooth() -> torch.Tensor:
    """24 images (24, 3, 32, 32) whose neighbouring pixels and whose channels are correlated."""
    noise = torch.randn(24, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise.double(), 2, stride=1)
    return smooth + 0.5 * smooth.flip(1)


def small() -> Airbench:
    """Narrow groups, in float64."""
    torch.manual_seed(0)
    return Airbench(widths=(8, 16, 16)).double()


def patches(images: torch.Tensor) -> torch.Tensor:
    """Every 2x2 patch of the images, (patches, C * 2 * 2)."""
    cut = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (B, C, 31, 31, 2, 2)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def test_whitened_patches_have_the_identity_as_their_second_moment(smooth):
    network = small()
    network.init_from_images(iter(smooth.split(10)))
    outputs = F.conv2d(smooth, network.whiten.weight)  # (B, 24, 31, 31)
    whitened = outputs.transpose(0, 1).flatten(1)[:12]  # those of the eigenvectors
    moment = whitened @ whitened.T / whitened.shape[1]
    vectors = patches(smooth)
    least = float(torch.linalg.eigvalsh(vectors.T @ vectors / len(vectors)).min())
    # an eigenvalue l becomes l / (l + EPS); beside that, sums over the patches round
    rounding = 1e3 * len(vectors) * torch.finfo(torch.float64).eps
    assert 10 * EPS < least < 1
    assert float((moment - torch.eye(12)).abs().max()) <= EPS / least + rounding
    assert float((moment - torch.diag(moment.diag())).abs().max()) <= rounding


def test_the_other_filters_are_the_negatives(smooth):
    network = small()
    network.init_from_images(iter([smooth]))
    assert torch.equal(network.whiten.weight[12:], -network.whiten.weight[:12])


def test_it_stops_reading_after_enough_images():
    read = []

    def batches():
        while True:
            read.append(1000)
            yield torch.randn(1000, 3, 3, 3)

    Airbench(widths=(8, 8, 8)).init_from_images(batches())
    assert sum(read) == IMAGES


def test_whitening_and_scales_are_fixed_and_the_rest_is_trained():
    network = build_network("airbench", ())
    names = [name for name, _ in network.backbone.named_parameters()]
    scales = [f"group{group}.{block}.{2 - block}.weight" for group in (1, 2, 3) for block in (0, 1)]
    assert network.fixed == {"whiten.weight", *scales}
    assert {"whiten.bias", "group1.0.2.bias", "group3.1.1.bias", "linear.weight"} <= set(names)


def test_its_norms_keep_six_tenths():
    """torch's momentum is the share of the new batch, the paper's that of the old average."""
    norms = [part for part in small().modules() if isinstance(part, nn.BatchNorm2d)]
    assert [norm.momentum for norm in norms] == [0.4] * 6


def test_a_convolution_passes_its_input_on():
    network = small()
    images = torch.randn(2, 24, 8, 8, dtype=torch.float64)
    conv = network.group1[0][0]
    with torch.no_grad():  # 24 inputs and 8 outputs: the first 8
        assert_close(conv(images), images[:, :8], terms=24 * 9)
    wide = network.group2[0][0]
    images = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(wide(images)[:, :8], images, terms=8 * 9)
        assert wide.weight[8:].abs().min() > 0


def test_what_its_exits_cost():
    cost = network_cost(build_network("airbench", head="pooled"))
    assert cost.exit_names == ("group1", "group2.0", "group2", "final")
    whiten = 31 * 31 * 24 * 12
    first = 31 * 31 * 64 * 24 * 9 + 15 * 15 * 64 * 64 * 9
    inside, second = 15 * 15 * 256 * 64 * 9, 7 * 7 * 256 * 256 * 9
    third = 7 * 7 * 256 * 256 * 9 + 3 * 3 * 256 * 256 * 9 + 256 * 10
    assert cost.stage_macs == (whiten + first, inside, second, third)
    assert cost.head_macs == (2 * 64 * 16 * 10, 2 * 256 * 16 * 10, 2 * 256 * 16 * 10, 0)
    assert round(cost.plain_macs / 1e6) == 118
