"""What a test may claim on any machine: the values that a message names, not its sentence, and
only what the processor at hand can compute."""

import functools
import re

import pytest
import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def assert_names(text: str, *values: object) -> None:
    """That a text names each value, and not as a part of a longer word or number. 1 is named by
    1.0, and 5 % by 5%."""
    for value in values:
        word = re.escape(str(value)).replace(r"\ ", r"\s*")
        whole = rf"(?<![\w.]){word}(?!\w)(?!\.0*[1-9])"
        assert re.search(whole, text, re.IGNORECASE), f"{value!r} is not named in {text!r}"


@functools.cache
def _problem(amp: str) -> str:
    """Why a convolution cannot be trained in a precision on this processor; empty if it can."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    try:
        with torch.autocast("cpu", DTYPES[amp]):
            logits = layers(torch.randn(2, 3, 8, 8))
        logits.float().sum().backward()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def require_precision(amp: str) -> None:
    """Skips the test if this processor cannot train in a precision."""
    if problem := _problem(amp):
        pytest.skip(f"no training in {amp} on this processor: {problem}")
