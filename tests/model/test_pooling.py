"""Pooling to a grid equals adaptive pooling, in value and gradient, traced for export or not."""

from functools import partial

import pytest
import torch
from helpers import assert_close, bound
from torch.nn import functional as F

from early_exit.model import heads, pooling
from early_exit.model.heads import LinearHead, build_head
from early_exit.model.pooling import AdaptiveMaxPool, average_pool, max_pool

SIZES = [(8, 8, 4), (8, 4, 2), (6, 9, 3), (7, 5, 4), (14, 14, 8), (3, 3, 8), (1, 1, 4), (5, 6, 1)]
"""Height, width and side of the grid: cells of equal size, overlapping ones, repeated pixels."""


def maps(height, width, channels=2, rows=3):
    """Features as ReLU leaves them: many are 0, so maxima have ties."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(
        rows, channels, height, width, dtype=torch.float64, generator=generator
    ).relu()
    return features.contiguous(memory_format=torch.channels_last)


def slow_cells(features, grid):
    """The pixels of each cell of a grid, row by row of it."""
    height, width = features.shape[2:]
    for row in range(grid):
        for column in range(grid):
            top, left = row * height // grid, column * width // grid
            bottom, right = -(-(row + 1) * height // grid), -(-(column + 1) * width // grid)
            yield features[:, :, top:bottom, left:right].flatten(2)


class Pools(torch.nn.Module):
    """Averages and maxima, as a module to export."""

    def __init__(self, grid):
        super().__init__()
        self.grid, self.largest = grid, AdaptiveMaxPool(grid)

    def forward(self, features):
        return average_pool(features, self.grid), self.largest(features)


def assert_slow_pools(pools, features, grid):
    """Averages and maxima are those of each cell."""
    averages, maxima = pools(features)
    cells = list(slow_cells(features, grid))
    means = torch.stack([cell.mean(2) for cell in cells], 2).unflatten(2, (grid, grid))
    largest = torch.stack([cell.amax(2) for cell in cells], 2).unflatten(2, (grid, grid))
    terms = features.shape[2] * features.shape[3]
    assert torch.equal(maxima, largest)
    assert (averages - means).abs().max() <= bound(torch.float64, terms) * means.max()


@pytest.mark.parametrize("height, width, grid", SIZES)
def test_pools_equal_the_slow_ones(height, width, grid):
    assert_slow_pools(Pools(grid), maps(height, width), grid)


@pytest.mark.parametrize("height, width, grid", [(7, 5, 4), (14, 14, 8), (1, 1, 4)])
def test_exported_pools_of_unequal_cells_equal_the_slow_ones(height, width, grid):
    features = maps(height, width)
    exported = torch.export.export(Pools(grid), (features,), strict=False)
    assert "adaptive" not in str(exported.graph)
    assert_slow_pools(exported.module(), features, grid)


@pytest.mark.parametrize("height, width, grid", SIZES)
def test_gradients_equal_those_of_adaptive_pooling(height, width, grid):
    features = maps(height, width).requires_grad_()
    weights = torch.rand(3, 2, grid, grid, generator=torch.Generator().manual_seed(1)).double()
    pairs = [(average_pool, F.adaptive_avg_pool2d), (max_pool, F.adaptive_max_pool2d)]
    for fast, slow in pairs:
        found, expected = (
            torch.autograd.grad((pool(features, grid) * weights).sum(), features)[0]
            for pool in (fast, slow)
        )
        # of at most grid^2 terms, each at most 1
        assert (found - expected).abs().max() <= bound(torch.float64, 2 + grid**2) * grid**2


def slow_logits(head, features):
    """The logits of a linear head by its definition, with adaptive pooling."""
    fine, middle, coarse = head.grids
    mean = F.adaptive_avg_pool2d(features, coarse)
    squares = F.adaptive_avg_pool2d(features.square(), coarse)
    parts = [
        F.adaptive_avg_pool2d(features, fine),
        F.adaptive_max_pool2d(features, middle),
        ((squares - mean.square()).clamp_min(0) + 1e-5).sqrt(),
    ]
    norm, values = head.norm, torch.cat([part.flatten(1) for part in parts], dim=1)
    if head.training:
        center, variance = values.mean(0), values.var(0, correction=0)
    else:
        center, variance = norm.running_mean, norm.running_var
    scaled = (values - center) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    return scaled @ head.linear.weight.T + head.linear.bias


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", [16, 14, 8, 1])
def test_linear_head_equals_its_definition(side, training):
    torch.manual_seed(0)
    head = LinearHead(channels=2, num_classes=3).double().train(training)
    with torch.no_grad():
        for values in (head.norm.weight, head.norm.running_var):
            values.uniform_(0.5, 2)
        for values in (head.norm.bias, head.norm.running_mean):
            values.uniform_(-1, 1)
    features = maps(side, side).requires_grad_()
    expected, found = slow_logits(head, features), head(features)
    inputs = [features, *head.parameters()]
    slow, fast = (
        torch.autograd.grad(logits.square().sum(), inputs) for logits in (expected, found)
    )
    # A difference of squares of at most 16 rounds by 16 epsilons for every pixel; the root with its
    # 1e-5 and BatchNorm with its own multiply that by at most 1 / 2e-5 in a value, and their
    # slopes by its square in a gradient
    exact = bound(torch.float64, 16 * side**2) / 2e-5
    assert (found - expected).abs().max() <= exact
    for one, other in zip(fast, slow, strict=True):
        assert (one - other).abs().max() <= exact / 2e-5 * max(1, other.detach().abs().max())


def test_state_dict_of_a_linear_head_has_its_old_names():
    assert list(LinearHead(2, 3).state_dict()) == [
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
        *("norm.num_batches_tracked", "linear.weight", "linear.bias"),
    ]


@pytest.mark.parametrize("kind, passes", [("linear", 3), ("pooled", 2)])
def test_passes_over_the_features(monkeypatch, kind, passes):
    """A head pools so many tensors of the features' size: for averages, for maxima and for the
    averages of squares. Coarse averages come from the fine ones."""
    shapes = []

    def noted(pool, features, grid):
        shapes.append(features.shape)
        return pool(features, grid)

    monkeypatch.setattr(heads, "average_pool", partial(noted, average_pool))
    monkeypatch.setattr(heads, "max_pool", partial(noted, max_pool))
    head = build_head(kind, (1, 2, 32, 32), num_classes=3).eval()
    features = torch.rand(2, 2, 32, 32)
    head(features)
    assert shapes.count(features.shape) == passes


@pytest.mark.slow
@pytest.mark.parametrize("kind, pools", [("linear", 4), ("pooled", 2)])
@pytest.mark.parametrize("side", [16, 14])
def test_heads_export_to_few_onnx_nodes(kind, pools, side):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from early_exit.inference.runtimes.base import Example
    from early_exit.inference.runtimes.onnx_export import export_segment
    from early_exit.inference.segments import Segment
    from early_exit.model.network import Stage

    head = build_head(kind, (1, 16, side, side), num_classes=10).eval()
    segment = Segment((Stage([], head).eval(),), "max_prob")
    model = onnx.load_from_string(export_segment(segment, Example(torch.rand(2, 16, side, side))))
    types = [node.op_type for node in model.graph.node]
    if side == 16:
        assert sum(kind in ("AveragePool", "MaxPool") for kind in types) == pools
        assert not {"Transpose", "Gather", "MatMul"} & set(types)
    assert not {"GatherND", "ScatterND", "Pad", "Slice", "Loop", "If"} & set(types)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "pooled", "mixed_pool", "branch1"])
def test_heads_run_in_onnx_runtime_where_cells_overlap(kind):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from early_exit.inference.runtimes.base import Example
    from early_exit.inference.runtimes.onnxruntime import OnnxRuntime
    from early_exit.inference.segments import Segment
    from early_exit.model.network import Stage

    torch.manual_seed(0)
    side = 28 if kind == "branch1" else 14  # a branch halves it first
    head = build_head(kind, (1, 2, side, side), num_classes=3).eval()
    features = maps(side, side).float().contiguous()
    runtime = OnnxRuntime(threads=1)
    segment = runtime.segment(Segment((Stage([], head).eval(),), "max_prob"), Example(features))
    with torch.no_grad():
        expected = head(features)
    found = torch.from_numpy(segment(features.numpy(), 1.0, None)[1])
    if kind == "linear":
        # the deviations' squares are at most 16, their root's slope at most 1 / (2 sqrt(1e-5))
        assert (found - expected).abs().max() <= bound(torch.float32, 16 * side**2) / 2e-3
    else:
        assert_close(found, expected, terms=2 * side**2)


@pytest.mark.parametrize("size", range(1, 34))
def test_plain_windows_are_the_cells_of_adaptive_pooling(size):
    """Wherever there are some: every cell, with borders, is that of torch's adaptive pooling."""
    features = torch.randn(2, 3, size, size)
    for grid in range(1, 9):
        windows = pooling._windows(features, grid)
        if windows:
            kernel, stride, padding = windows
            found = F.max_pool2d(features, kernel, stride, padding)
            assert torch.equal(found, F.adaptive_max_pool2d(features, grid))
            average = F.avg_pool2d(features, kernel, stride, padding, count_include_pad=False)
            expected = F.adaptive_avg_pool2d(features, grid)
            assert_close(average, expected, terms=kernel[0] * kernel[1])


def test_odd_sides_have_plain_windows():
    """Of the maps of airbench, and of an even side whose cells are of different sizes."""
    sides = {size: pooling._window(size, 4) for size in (7, 15, 31, 16, 14)}
    assert sides == {7: (3, 2, 1), 15: (5, 4, 1), 31: (9, 8, 1), 16: (4, 4, 0), 14: None}
