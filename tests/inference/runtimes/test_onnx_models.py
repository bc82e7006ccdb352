"""What the runtimes of ONNX models share: pixels from normalised images, and who gets which."""

import numpy as np
import torch

from early_exit.data.pixels import normalise
from early_exit.inference.runtimes import onnx_export
from early_exit.inference.runtimes.base import Example
from early_exit.inference.runtimes.onnx_models import OnnxModels, pixels_of
from early_exit.inference.segments import Segment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def every_pixel():
    """Two images with all 256 values in every channel, (2, 3, 16, 16) uint8."""
    values = torch.arange(256).byte().view(1, 1, 16, 16).expand(1, 3, 16, 16)
    return torch.cat([values, 255 - values])


def test_pixels_are_those_that_were_normalised():
    for layout in (torch.contiguous_format, torch.channels_last):
        normalised = normalise(every_pixel(), MEAN, STD, layout)
        assert torch.equal(pixels_of(normalised, MEAN, STD), every_pixel())


def test_values_beyond_the_range_become_its_ends():
    images = torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1)
    assert pixels_of(images, (0.5,), (0.2,)).flatten().tolist() == [0, 255]


class Recorded(OnnxModels):
    """Keeps what models are quantised with."""

    def __init__(self, precision):
        self.precision, self.examples = precision, []

    def quantise(self, model, example):
        """The model with a mark."""
        self.examples.append(example.features)
        return model + b" in int8"


def models_of(monkeypatch, precision):
    """The models of a first and a later segment where the first takes pixels; and the features that
    they were quantised with."""
    monkeypatch.setattr(onnx_export, "export_segment", lambda *_: b"model")
    runtime, scale = Recorded(precision), (MEAN, STD)
    normalised = normalise(every_pixel(), MEAN, STD, torch.contiguous_format)
    models = [
        runtime.model(Segment((), "max_prob", is_first=True), Example(normalised), scale),
        runtime.model(Segment((), "max_prob", is_first=True), Example(normalised)),
        runtime.model(Segment((), "max_prob"), Example((normalised, normalised))),
    ]
    return models, runtime.examples, normalised


def test_a_segment_that_takes_pixels_is_quantised_with_pixels(monkeypatch):
    models, (pixels, images, features), normalised = models_of(monkeypatch, "int8")
    assert models == [b"model in int8"] * 3
    assert np.array_equal(pixels.numpy(), every_pixel().numpy())
    assert images is normalised and features[0] is normalised


def test_a_float_model_stays_as_it_was_exported(monkeypatch):
    models, examples, _ = models_of(monkeypatch, "f32")
    assert models == [b"model"] * 3 and examples == []
