"""Another processor's rounding, simulated: every convolution and linear layer is a little off.

EARLY_EXIT_PERTURB=4 makes the outputs wrong by up to 4 epsilon of their dtype, relative to each of
them. The noise follows from the output's bits, the place in it and its shape and strides: repeating
a computation repeats it to the bit, and the same rows in a batch of another size or layout come out
a little different, as with real kernels.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

VARIABLE = "EARLY_EXIT_PERTURB"
LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
# odd constants of the splitmix64 generator, as signed 64-bit integers
STEP, MIX, MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def wanted() -> float:
    """How many epsilon the environment asks for; 0: none."""
    return float(os.environ.get(VARIABLE) or 0)


def noise(output: Tensor) -> Tensor:
    """A number in [-1, 1) for every entry, float64, from its bits and its place."""
    place = torch.arange(output.numel(), device=output.device).reshape(output.shape)
    layout = hash((tuple(output.shape), output.stride()))  # of integers: the same in every process
    mixed = output.view(BITS[output.element_size()]).long() * MIX + place * STEP + layout
    mixed = (mixed ^ (mixed >> 30)) * MIX
    mixed = (mixed ^ (mixed >> 27)) * MIX2
    return (mixed >> 11).double() / 2**52


def perturb(output: Tensor, epsilons: float) -> Tensor:
    """The output, off by at most so many epsilon of its dtype."""
    compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if compiled or type(output) not in (Tensor, torch.nn.Parameter) or output.is_meta:
        return output
    if not output.is_floating_point():
        return output
    with torch.no_grad():
        factor = 1 + epsilons * torch.finfo(output.dtype).eps * noise(output.detach())
        factor = factor.to(output.dtype)
    return output * factor


def _perturbed(layer: Callable, epsilons: float) -> Callable:
    @functools.wraps(layer)
    def call(*arguments, **options):
        return perturb(layer(*arguments, **options), epsilons)

    return call


@contextmanager
def perturbed(epsilons: float) -> Iterator[None]:
    """While this lasts, torch.nn's convolutions and linear layers are off by up to `epsilons`."""
    originals = {name: getattr(functional, name) for name in LAYERS}
    for name, layer in originals.items():
        setattr(functional, name, _perturbed(layer, epsilons))
    try:
        yield
    finally:
        for name, layer in originals.items():
            setattr(functional, name, layer)
