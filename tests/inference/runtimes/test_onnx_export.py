"""The ONNX models of segments: the same outputs as in torch, for any number of rows."""

import logging
import warnings

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_names
from torch import nn

from early_exit.data.pixels import normalise
from early_exit.errors import UserError
from early_exit.inference.criteria import CRITERIA, apply_criterion, declare
from early_exit.inference.runtimes import onnx_export
from early_exit.inference.runtimes.base import Example
from early_exit.inference.runtimes.onnx_export import export_network, export_segment
from early_exit.inference.runtimes.onnxruntime import OnnxRuntime
from early_exit.inference.segments import Segment, segment_of
from early_exit.model.heads import build_head
from early_exit.model.network import Stage
from imagenet.networks import build_network

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

CLASSES = 4
RUNTIME = OnnxRuntime(threads=1)
TEMPERATURE = 1.5
CRITERION_TERMS = 40  # a softmax of four classes, its logarithm, and a sum


def images(rows=7, side=8):
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(0))


def first_segment(head="conv", criterion="max_prob", side=8, channels=4):
    """A convolution, BatchNorm and ReLU with a head, as the first of several segments."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    stage = Stage(body, build_head(head, (1, channels, side, side), CLASSES))
    shuffle_statistics(stage)
    return Segment((stage.eval(),), criterion, is_first=True)


def shuffle_statistics(module):
    """Gives every BatchNorm other statistics and weights than those it starts with."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor in (part.running_mean, part.running_var, part.weight, part.bias):
                tensor.data.uniform_(0.5, 1.5, generator=generator)


def nodes(model):
    return [node.op_type for node in onnx.load_model_from_string(model).graph.node]


def assert_near(found, expected, terms):
    """The same up to `terms` roundings of float32, relative to the largest entry or to 1."""
    found = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if not expected.is_floating_point():
        assert torch.equal(found, expected)
        return
    scale = max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= terms * torch.finfo(torch.float32).eps * scale


def assert_same(segment, features, terms, state=None, model=None):
    """A segment's model computes what the segment does, for one row and for all seven.

    terms: roundings of features and logits. What the criterion returns is compared with that of the
    model's own logits. Returns the outputs in torch.
    """
    model = model or export_segment(segment, Example(features, state))
    call = RUNTIME.load(model)
    several = isinstance(features, tuple)
    for rows in (1, 7):
        inputs = tuple(part[:rows] for part in (features if several else (features,)))
        inputs = inputs if several else inputs[0]
        given = None if state is None else state[:rows]
        with torch.no_grad():
            expected = segment(inputs, TEMPERATURE, given)
        arrays = tuple(part.numpy() for part in inputs) if several else inputs.numpy()
        found = call(arrays, TEMPERATURE, None if given is None else given.numpy())
        parts = (found[0], expected[0]) if several else ((found[0],), (expected[0],))
        assert len(parts[0]) == len(parts[1])
        for array, tensor in zip(*parts, strict=True):
            assert_near(array, tensor, terms)
        assert_near(found[1], expected[1], terms)
        logits = torch.from_numpy(found[1])
        own = apply_criterion(segment.criterion, logits, TEMPERATURE, given)
        for array, tensor in zip(found[2:], own, strict=True):
            assert (array is None) == (tensor is None)
            if tensor is not None:
                assert_near(array, tensor, CRITERION_TERMS)
    with torch.no_grad():
        return segment(features, TEMPERATURE, state)


@pytest.fixture
def criterion(monkeypatch):
    """A function that adds a criterion for one test and returns its name."""

    def add(function, **traits):
        monkeypatch.setitem(CRITERIA, function.__name__, declare(**traits)(function))
        return function.__name__

    return add


# the body: 27 products and BatchNorm; a conv head: 3x3 convolutions of 4 and 16 channels, pooling
TERMS = 27 + 4 + 9 * 4 + 9 * 16 + 16 + 16


def test_a_segment_is_the_same_for_any_number_of_rows():
    assert_same(first_segment(), images(), TERMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["entropy", "margin", "patience"])
def test_criteria_are_part_of_the_model(name):
    first = first_segment(criterion=name)
    features, *_, state = assert_same(first, images(), TERMS)
    body, head = [nn.Conv2d(4, 4, 3, padding=1)], build_head("conv", (1, 4, 8, 8), CLASSES)
    assert_same(Segment((Stage(body, head).eval(),), name), features, TERMS, state)


@pytest.mark.slow
def test_a_criterion_may_keep_a_state_of_any_type_and_shape(criterion):
    def history(logits, state=None):
        """The sum of the probabilities so far, twice, and the answers as integers."""
        probs = logits.softmax(dim=-1)
        total = probs if state is None else probs + state[..., 0]
        return total.log(), total.amax(dim=-1), torch.stack([total, total], dim=-1)

    name = criterion(history, keeps_state=True)
    features, *_, state = assert_same(first_segment(criterion=name), images(), TERMS)
    assert state.shape == (7, CLASSES, 2)
    stage = Stage([nn.Conv2d(4, 4, 1)], build_head("conv", (1, 4, 8, 8), CLASSES)).eval()
    assert_same(Segment((stage,), name), features, TERMS, state)


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, True])
def test_a_state_may_be_the_logits_or_unused_or_handed_on(criterion, second):
    def handed_on(logits, state=None):
        return logits, logits.amax(dim=-1), logits if state is None else state

    def unused(logits, state=None):
        return logits, logits.amax(dim=-1), logits

    state = torch.rand(7, CLASSES) if second else None
    for function in (handed_on, unused):
        name = criterion(function, keeps_state=True)
        assert_same(first_segment(criterion=name), images(), TERMS, state)


@pytest.mark.slow
def test_features_may_be_a_tuple():
    class Maps(nn.Module):
        """An image to a map of full and one of half resolution."""

        def __init__(self):
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, images):
            return self.fine(images), self.coarse(images)

    class Coarser(nn.Module):
        """The first map as it is, the second with a convolution of the first added."""

        def __init__(self):
            super().__init__()
            self.down = nn.Conv2d(4, 4, 3, 2, 1)

        def forward(self, maps):
            return maps[0], maps[1] + self.down(maps[0])

    class Classify(nn.Module):
        def forward(self, maps):
            return maps[1].mean(dim=(2, 3))

    torch.manual_seed(0)
    shapes = (1, 4, 8, 8), (1, 4, 4, 4)
    heads = [build_head("conv", shapes, CLASSES) for _ in range(2)]
    stages = [Stage([Maps()], heads[0]), Stage([Coarser()], heads[1]), Stage([Classify()], None)]
    first, second, final = (Segment((stage.eval(),), "max_prob") for stage in stages)
    first = Segment(first.stages, "max_prob", is_first=True)
    with torch.no_grad():
        maps, *_ = first(images(), 1.0)
        later, *_ = second(maps, 1.0)
    model = RUNTIME.load(export_segment(first, Example(images())))
    found = model(images().numpy())[0]
    assert isinstance(found, tuple)
    for array, tensor in zip(found, maps, strict=True):
        assert_near(array, tensor, 27)
    assert_same(second, maps, TERMS)
    logits = RUNTIME.load(export_segment(final, Example(later)))(
        tuple(part.numpy() for part in later)
    )[1]
    assert_near(logits, later[1].mean(dim=(2, 3)), 16)


@pytest.mark.slow
@pytest.mark.parametrize("class_token", [False, True])
def test_features_may_be_tokens(class_token):
    class Tokens(nn.Module):
        def forward(self, patches):
            tokens = patches.flatten(2).transpose(1, 2)
            return torch.cat([tokens[:, :1], tokens], dim=1) if class_token else tokens

    torch.manual_seed(0)
    tokens = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), Tokens())
    head = build_head("conv", (1, 16 + class_token, 8), CLASSES)
    stage = Stage([tokens, nn.LayerNorm(8)], head).eval()
    # LayerNorm: two sums of eight; the deviation is not far below 1
    assert_same(Segment((stage,), "max_prob", is_first=True), images(), 27 + 64 + 9 * 8 + 9 * 32)


# The sums of the longest path: the body's, those of a head's convolutions, its linear layer's. A
# deviation of LinearHead is the root of a difference, in which a few digits cancel.
HEADS = [
    ("linear", 8, 27 + 8 * (8 * 8 + 16 + 4) * 4),
    ("linear", 5, 27 + 8 * (5 * 5 + 16 + 4) * 4),
    ("pooled", 8, 27 + 8 * (16 + 16) * 4),
    ("pooled", 5, 27 + 8 * (16 + 16) * 4),
    ("mixed_pool", 8, 27 + 4 * 16),
    ("mixed_pool", 3, 27 + 4 * 16),
    ("branch1", 8, 27 + 9 * 4 + 8 * 64),
    ("branch3", 9, 27 + 9 * (4 + 8 + 8) + 8 * 64),
    ("separable", 8, 27 + 9 + 4 + 16 + 4),
    ("msdnet", 8, 27 + 4 + 9 * (4 + 128) + 4 + 128),
    ("conv", 3, TERMS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("head", "side", "terms"), HEADS)
def test_heads_are_exported_and_have_no_batchnorm(head, side, terms):
    segment = first_segment(head, side=side)
    model = export_segment(segment, Example(images(side=side)))
    assert "BatchNormalization" not in nodes(model)
    assert_same(segment, images(side=side), terms, model=model)


@pytest.mark.slow
def test_a_batchnorm_that_cannot_be_folded_stays():
    network = nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, CLASSES)
    ).eval()
    shuffle_statistics(network)
    model = export_network(network, images())
    assert "BatchNormalization" in nodes(model)
    with torch.no_grad():
        assert_near(RUNTIME.load(model)(images().numpy())[1], network(images()), 4 + 27 + 144)


@pytest.mark.slow
def test_a_disabled_exit_between_leaves_no_trace(trained_net, images):
    merged = segment_of(trained_net, 0, 2, "max_prob")
    model = export_segment(merged, Example(images[:7]))
    # stem, three blocks of which the last halves the map: 3x3 convolutions of 3 to 32 channels; a
    # mixed_pool head of 32 channels and 16 cells
    assert_same(merged, images[:7], 27 + 9 * (16 * 3 + 32) + 8 + 16 * 32, model=model)
    assert nodes(model).count("Gemm") == 1
    final = segment_of(trained_net, 3, 3, "max_prob")
    with torch.no_grad():
        features, *_ = merged(images[:7], 1.0)
    model = export_segment(final, Example(features))
    outputs = [item.name for item in onnx.load_model_from_string(model).graph.output]
    assert outputs == ["logits", "answer", "score"]
    assert_same(final, features, 9 * (32 + 64) + 16 + 64, model=model)


@pytest.mark.slow
def test_images_may_be_bytes(trained_net):
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8, generator=generator)
    normalised = normalise(pixels, mean, std, torch.contiguous_format)
    segment = segment_of(trained_net, 0, 0, "max_prob")
    of_bytes = export_segment(segment, Example(normalised), input_scale=(mean, std))
    of_floats = export_segment(segment, Example(normalised))
    found = RUNTIME.load(of_bytes)(pixels.numpy())
    expected = RUNTIME.load(of_floats)(normalised.numpy())
    for array, other in zip(found[:4], expected[:4], strict=True):
        # a subtraction and a product, and the sums of what follows
        assert_near(array, torch.from_numpy(other), 2 + 27 + 2 + 16 * 16)


@pytest.mark.slow
def test_torchvisions_resnet18():
    torch.manual_seed(0)
    network = build_network("resnet18", num_classes=CLASSES, image_size=64).eval()
    shuffle_statistics(network)
    terms = 147 + 9 * (4 * 64 + 64 + 3 * 128 + 128 + 3 * 256 + 256 + 3 * 512) + 8 + 512
    features = images(side=64)
    for index in range(network.num_exits):
        segment = segment_of(network, index, index, "max_prob")
        model = export_segment(segment, Example(features))
        assert "BatchNormalization" not in nodes(model)
        features, *_ = assert_same(segment, features, terms, model=model)


@pytest.mark.slow
def test_a_model_is_the_same_each_time_and_names_no_path():
    segment = first_segment()
    models = [export_segment(segment, Example(images())) for _ in range(2)]
    assert models[0] == models[1]
    assert str(ROOT).encode() not in models[0] and b".py" not in models[0]
    inputs = onnx.load_model_from_string(models[0]).graph.input
    assert inputs[0].type.tensor_type.shape.dim[0].dim_param == "rows"


@pytest.mark.slow
def test_exporting_changes_neither_the_mode_nor_the_weights():
    segment = first_segment()
    (stage,) = segment.stages
    stage.train()
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    model = export_segment(segment, Example(images()))
    assert all(part.training for part in stage.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in stage.state_dict().items())
    stage.eval()
    assert_same(segment, images(), TERMS, model=model)


class TestErrors:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["by_value", "by_rows"])
    def test_a_criterion_that_cannot_be_traced_is_named(self, criterion, kind, capfd):
        def by_value(logits, state=None):
            return logits, logits[:, 0] if logits.max() > 0 else logits[:, 1], None

        def by_rows(logits, state=None):
            return logits, logits[:, 0] if len(logits) > 1 else logits[:, 1], None

        name = criterion({"by_value": by_value, "by_rows": by_rows}[kind])
        log, filters = logging.getLogger("torch.onnx"), list(warnings.filters)
        before = log.disabled, log.level, logging.root.manager.disable
        with pytest.raises(UserError) as caught:
            export_segment(first_segment(criterion=name), Example(images()))
        assert_names(str(caught.value), name)
        assert "\n" not in str(caught.value)
        assert (log.disabled, log.level, logging.root.manager.disable) == before
        assert warnings.filters == filters
        assert capfd.readouterr() == ("", "")

    @pytest.mark.slow
    def test_a_network_that_cannot_be_traced_is_not_the_criterions_fault(self):
        class Fork(nn.Module):
            def forward(self, features):
                return features if features.mean() > 0 else -features

        network = nn.Sequential(Fork(), nn.Flatten(), nn.Linear(192, CLASSES)).eval()
        with pytest.raises(UserError, match="network"):
            export_network(network, images())
        segment = Segment((Stage([network], None),), "entropy", is_first=True)
        with pytest.raises(UserError) as caught:
            export_segment(segment, Example(images()))
        assert "entropy" not in str(caught.value)

    def test_one_row_is_not_enough(self):
        with pytest.raises(UserError) as caught:
            export_segment(first_segment(), Example(images(1)))
        assert_names(str(caught.value), "two", 1)

    def test_a_file_has_a_limit(self, monkeypatch):
        segment = first_segment()
        (stage,) = segment.stages
        tensors = (*stage.parameters(), *stage.buffers())
        size = sum(tensor.nbytes for tensor in tensors)
        monkeypatch.setattr(onnx_export, "MAX_BYTES", size - 1)
        with pytest.raises(UserError) as caught:
            export_segment(segment, Example(images()))
        assert_names(str(caught.value), f"{size:,}", f"{size - 1:,}")
