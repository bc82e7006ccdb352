"""Heads: features to logits."""

import pytest
import torch
from helpers import bound, refusal

from early_exit.model.heads import (
    HEADS,
    BranchHead,
    ConvHead,
    LinearHead,
    MixedPoolHead,
    PooledHead,
    SeparableHead,
    TokenMap,
    build_head,
    deviation,
    finest_grid,
)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("batch", [1, 3])
def test_head_maps_features_to_logits(kind, batch):
    head = build_head(kind, torch.Size((1, 6, 8, 8)), num_classes=5).eval()
    assert head(torch.rand(batch, 6, 8, 8)).shape == (batch, 5)


def test_linear_head_by_hand():
    head = LinearHead(channels=2, num_classes=1).eval()
    maxima, deviations = 2 * 64, 2 * (64 + 16)  # where they begin
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.weight[0, 1] = 3.0  # the first channel's average in the second of 8x8 cells
        head.linear.weight[0, maxima + 16] = 0.5  # the second channel's maximum, first of 4x4
        head.linear.weight[0, deviations + 7] = 7.0  # its deviation in the last of 2x2
        head.linear.bias.fill_(1.0)
        head.norm.running_var.fill_(4.0 - head.norm.eps)  # features are halved
        head.norm.running_mean[1] = 1.0  # and that average lowered by 1 before
    features = torch.zeros(1, 2, 16, 16)
    features[0, 0, :2, 2:4] = torch.tensor([[1.0, 2.0], [2.0, 3.0]])  # mean 2
    features[0, 1, 3, 3] = 8.0  # a maximum of 8
    features[0, 1, 8:, 8:12] = 6.0  # half of a cell 6, half 0: a deviation of 3
    expected = 3 * (2 - 1) / 2 + 0.5 * 8 / 2 + 7 * 3 / 2 + 1
    assert head(features).item() == pytest.approx(expected, rel=1e-5)


def test_pooled_head_by_hand():
    head = PooledHead(channels=2, num_classes=1).double().eval()
    assert head.grid == 4
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.weight[0, 1] = 3.0  # the first channel's average in the second cell
        head.linear.weight[0, 2 * 16 + 16 + 5] = 0.5  # the second's maximum, second row and column
        head.linear.bias.fill_(1.0)
        head.norm.running_var.fill_(4.0 - head.norm.eps)  # features are halved
        head.norm.running_mean[1] = 1.0  # and that average lowered by 1 before
    features = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    features[0, 0, :2, 2:4] = torch.tensor([[1.0, 2.0], [2.0, 3.0]])  # mean 2
    features[0, 1, 3, 3] = 8.0  # a maximum of 8
    assert head(features).item() == pytest.approx(3 * (2 - 1) / 2 + 0.5 * 8 / 2 + 1)


def test_deviation_equals_the_slow_one():
    features = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    cells = features.double().unflatten(2, (2, 3)).unflatten(4, (2, 3)).transpose(3, 4)
    slow = cells.flatten(4).var(dim=4, correction=0)
    # the 1e-5 that keeps the root's slope finite; the rest is a difference of two sums of 9 terms,
    # each at most 1
    off = (deviation(features, 2).double().square() - slow - 1e-5).abs().max()
    assert off <= bound(torch.float32, 2 * (9 + 4))


def test_deviation_of_even_features_has_a_finite_slope():
    features = torch.full((1, 1, 4, 4), 3.0, requires_grad=True)
    deviation(features, 1).sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    "channels, num_classes, finest, grid",
    [
        (128, 10, 8, 8),  # 81,920 weights
        (157, 10, 8, 4),  # 100,480 on 8x8
        (128, 10, 4, 4),
        (16, 100, 8, 4),  # 102,400 on 8x8, 25,600 on 4x4
        (256, 1000, 8, 1),  # 256,000 at least
    ],
)
def test_grid_is_the_finest_that_keeps_the_layer_small(channels, num_classes, finest, grid):
    assert finest_grid(channels, num_classes, finest) == grid


def test_conv_head_by_hand():
    head = ConvHead(channels=1, num_classes=1).eval()
    with torch.no_grad():
        head[0].weight.fill_(1.0)
        head[-1].weight.fill_(2.0)
        head[-1].bias.fill_(1.0)
    # Windows of a 3x3 kernel at stride 2 on 4x4 ones padded by one: 4, 6, 6 and 9 of them inside.
    # Fresh BatchNorm divides by sqrt(1 + 1e-5); mean 6.25, and 2 * 6.25 + 1 = 13.5.
    logits = head(torch.ones(1, 1, 4, 4))
    assert logits.item() == pytest.approx(13.5, rel=1e-4)


def test_separable_head_by_hand():
    head = SeparableHead(channels=2, num_classes=1).eval()
    with torch.no_grad():
        head[0].weight.fill_(1.0)
        head[2].weight.copy_(torch.tensor([[1.0, -2.0], [-1.0, 1.0]])[:, :, None, None])
        head[-1].weight.copy_(torch.tensor([[2.0, 5.0]]))
        head[-1].bias.fill_(1.0)
    # Ones in the first channel give windows of 4, 6, 6 and 9, as above; zeros in the second. The
    # mixture is (6.25, -6.25) on average, of which ReLU keeps the first: 2 * 6.25 + 1 = 13.5.
    features = torch.stack([torch.ones(4, 4), torch.zeros(4, 4)])[None]
    assert head(features).item() == pytest.approx(13.5, rel=1e-4)


def test_separable_head_is_never_wider_than_512():
    head = SeparableHead(channels=600, num_classes=3)
    assert head[2].weight.shape == (512, 600, 1, 1)
    assert SeparableHead(channels=40, num_classes=3)[2].weight.shape == (40, 40, 1, 1)


def test_tokens_become_the_map_of_their_patches():
    tokens = torch.arange(2 * 5 * 3).view(2, 5, 3)  # a class token and 2 x 2 patches
    laid_out = TokenMap()(tokens)
    assert laid_out.shape == (2, 3, 2, 2)
    assert laid_out[0, :, 0, 1].tolist() == tokens[0, 2].tolist()
    assert laid_out[1, :, 1, 0].tolist() == tokens[1, 3].tolist()


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_takes_tokens(kind):
    head = build_head(kind, torch.Size((1, 17, 6)), num_classes=5).eval()
    assert head(torch.rand(3, 17, 6)).shape == (3, 5)


@pytest.mark.parametrize("mix, logit", [(0.5, 2.5), (0.25, 1.75), (0.0, 1.0), (1.0, 4.0)])
def test_mixed_pool_head_by_hand(mix, logit):
    head = MixedPoolHead(channels=1, num_classes=1).double()
    with torch.no_grad():
        head.mix.fill_(mix)
        head.linear.weight.fill_(1 / 16)
        head.linear.bias.zero_()
    # 8x8 features of 2x2 cells (0, 0, 0, 4): every cell has maximum 4 and mean 1
    features = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    features[:, :, 1::2, 1::2] = 4.0
    assert head(features).item() == pytest.approx(logit)


def test_branch_head_by_hand():
    """ReLU, max pooling of 3x3 with stride 2, a convolution, max pooling again, a linear layer."""
    head = BranchHead(channels=1, num_classes=1, side=8, convs=1).double()
    conv, linear = head[2], head[-1]
    assert (conv.out_channels, linear.in_features) == (2, 2 * 2 * 2)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 1, 1] = 2.0  # twice the pixel; the other channel only its bias
        conv.bias.copy_(torch.tensor([-1.0, 0.5]))
        linear.weight.copy_(torch.tensor([[1.0, 0, 0, 10.0, 0.25, 0, 0, 0]]))
        linear.bias.fill_(3.0)
    features = torch.full((1, 1, 8, 8), -5.0, dtype=torch.float64)
    features[0, 0, 0, 0] = 4.0  # 2 * 4 - 1 = 7 in the first quarter
    features[0, 0, 7, 7] = 1.0  # 2 * 1 - 1 = 1 in the last
    assert head(features).item() == pytest.approx(1 * 7 + 10 * 1 + 0.25 * 0.5 + 3)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_head_takes_features_of_any_size(kind, side):
    head = build_head(kind, torch.Size((1, 3, side, side)), num_classes=2).eval()
    assert head(torch.rand(2, 3, side, side)).shape == (2, 2)


@pytest.mark.parametrize("kind", HEADS)
def test_head_answers_each_row_alone_in_eval_mode(kind):
    torch.manual_seed(0)
    head = build_head(kind, torch.Size((1, 4, 8, 8)), num_classes=3).double().eval()
    if kind == "linear":
        # it pools in float32 (a difference of squares), of 8x8 pixels; then 84 numbers a channel
        dtype, terms = torch.float32, 2 * 64 + 4 * 84
    else:
        # the longest: two 3x3 convolutions of 4 and 128 channels, and a linear layer of 128
        dtype, terms = torch.float64, 9 * (4 + 128) + 4 + 128
    features = torch.rand(5, 4, 8, 8, dtype=torch.float64)
    alone, together = torch.cat([head(row[None]) for row in features]), head(features)
    limit = bound(dtype, terms) * float(together.detach().abs().max())
    assert (together - alone).abs().max() <= limit


def test_unknown_head_is_refused_with_the_known_ones_named():
    message = refusal(build_head, "dense", torch.Size((1, 4, 8, 8)), 2)
    assert "'dense'" in message and all(kind in message for kind in HEADS)


@pytest.mark.parametrize("count", [16, 17])
def test_tokens_with_and_without_a_class_token(count):
    tokens = torch.rand(2, count, 6)
    laid_out = TokenMap()(tokens)
    assert laid_out.shape == (2, 6, 4, 4)
    assert torch.equal(laid_out[:, :, 0, 0], tokens[:, count - 16])
    assert torch.equal(laid_out[:, :, 3, 3], tokens[:, -1])
    head = build_head("linear", tokens[:1].shape, 5).eval()
    assert head(tokens).shape == (2, 5)


@pytest.mark.parametrize("shape", [(1, 6), (1, 18, 6), (1, 2, 3, 4, 5)])
def test_features_of_other_shapes_are_refused(shape):
    message = refusal(build_head, "conv", torch.Size(shape), 5)
    assert str(shape) in message
