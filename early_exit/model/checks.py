"""Checks of a network before it is trained: its units are its backbone, its heads give logits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.errors import UserError
from early_exit.model.features import Features, describe_shape
from early_exit.model.network import MultiExitNetwork, evaluation_mode, run_units


def check_network(network: MultiExitNetwork) -> None:
    """Raises UserError if the network would be trained or evaluated wrongly.

    Five things are checked: no unit has parameters, buffers or dropout outside the backbone; no
    BatchNorm normalises by the batch at hand; the units, one after the other, equal the backbone;
    every head gives logits (B, K); neither a head nor the unit after it changes the features in
    place. The comparison uses perturbed weights, because a fresh BatchNorm
    or a layer that starts at 0 changes nothing; every weight and mode is restored afterwards.
    """
    check_units_belong(network.backbone, network.units)
    check_running_statistics(network)
    parameter = next(network.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, *network.image_shape, generator=generator, device="cpu").to(parameter)
    features = check_units_equal_backbone(network.backbone, network.units, image)
    units = list(network.units.items())
    for head, (place, cut) in zip(network.heads.values(), network.cuts.items(), strict=True):
        name, unit = units[cut + 1]
        with torch.no_grad(), evaluation_mode(unit), unchanged(features[cut], f"the unit {name}"):
            unit(features[cut])
        check_head(head, place, features[cut], network.num_classes)


def check_units_belong(backbone: nn.Module, units: Mapping[str, nn.Module]) -> None:
    """Raises UserError for a unit with a module of its own that learns or behaves differently in
    training: only the backbone's modules are trained, saved and switched to eval mode."""
    known_modules = set(backbone.modules())
    known_tensors = {id(tensor) for tensor in (*backbone.parameters(), *backbone.buffers())}
    for name, unit in units.items():
        for module in set(unit.modules()) - known_modules:
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            foreign = any(id(tensor) not in known_tensors for tensor in own)
            if foreign or isinstance(module, nn.modules.dropout._DropoutNd):
                raise UserError(
                    f"the unit {name} has a {type(module).__name__} that is not part of the"
                    " backbone, so it would be neither trained nor saved; make it one of the"
                    " backbone's modules"
                )


def check_running_statistics(network: nn.Module) -> None:
    """Raises UserError for a BatchNorm without running statistics: an image's answer would depend
    on the other rows of its batch, and which rows remain depends on the policy."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UserError(
                f"{name} normalises by the batch at hand (track_running_stats=False), so an"
                " image's answer would depend on the other images; use running statistics"
            )


def check_units_equal_backbone(
    backbone: nn.Module, units: Mapping[str, nn.Module], image: Tensor
) -> list[Features]:
    """The features after each unit, with perturbed weights.

    image: (1, C, H, W). Raises UserError if the units, one after the other, do not equal the
    backbone. On the meta device nothing is compared.
    """
    with torch.no_grad(), restored(backbone), evaluation_mode(backbone):
        _perturb(backbone)
        features = run_units(units, image)
        if image.is_meta:  # nothing is computed
            return features
        expected = backbone(image)
    logits: Any = features[-1]
    if describe_shape(logits) != describe_shape(expected):
        raise UserError(
            f"the units one after the other give {describe_shape(logits)}, the backbone gives"
            f" {describe_shape(expected)}; every step of its forward must be in a unit"
        )
    close = torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    if expected.isfinite().all() and not close:  # a thousand untrained layers may overflow
        raise UserError(
            "the units one after the other do not equal the backbone: with the same weights their"
            " output differs; every step of its forward must be in a unit, including additions of"
            " earlier features and flattening"
        )
    return features


def check_head(head: nn.Module, name: str, features: Features, num_classes: int) -> None:
    """Raises UserError if a head does not map the features of one image to logits (1, K), or
    changes them in place."""
    with torch.no_grad(), restored(head), evaluation_mode(head):
        with unchanged(features, f"the head of {name}"):
            (logits,) = run_units({f"head of {name}": head}, features)
    if describe_shape(logits) != str((1, num_classes)):
        raise UserError(
            f"the head of {name} maps {describe_shape(features)} to {describe_shape(logits)};"
            f" expected logits {(1, num_classes)}"
        )


@contextmanager
def unchanged(features: Features, reader: str) -> Iterator[None]:
    """Raises UserError if features that an exit and the next unit both read are changed in place in
    the context. reader: who computes with them there."""
    tensors = features if isinstance(features, tuple) else (features,)
    before = [tensor._version for tensor in tensors]
    yield
    if [tensor._version for tensor in tensors] != before:
        raise UserError(
            f"{reader} changes its input in place, which the exit and the next unit both read; use"
            " an operation that is not in place, such as nn.ReLU()"
        )


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Restores a module's parameters and buffers to the bit after the context."""
    values = [(tensor, tensor.clone()) for tensor in (*module.parameters(), *module.buffers())]
    try:
        yield
    finally:
        for tensor, value in values:
            tensor.copy_(value)


def _perturb(network: nn.Module) -> None:
    """Changes every parameter and buffer by about its own size. Variances only grow, so that a deep
    network does not overflow."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name.endswith("running_var"):
            tensor.mul_(4).add_(0.1)
        elif tensor.is_floating_point():
            draw = torch.rand(tensor.shape, generator=generator, device="cpu").to(tensor)
            if tensor.ndim > 1:
                reach = tensor[0].numel() ** -0.5
                tensor.mul_(0.75 + 0.5 * draw).add_(draw - 0.5, alpha=0.1 * reach)
            else:
                tensor.mul_(0.75 + 0.5 * draw).add_(draw, alpha=0.1)
