"""State dicts: found in what a file holds, brought to a network's names, and loaded strictly."""

import logging
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from early_exit.errors import UserError
from early_exit.system.text import first_few
from early_exit.training.weight_files import Blank

log = logging.getLogger(__name__)

Weights = Mapping[str, Tensor]

# Parts of names that torch's wrappers add: DataParallel, compile, FSDP, activation checkpoints.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Names in torchvision's own files of DenseNets and ViTs, and those that its networks have today.
RENAMED = (
    (r"(\bdenselayer\d+\.(?:norm|conv))\.(\d\.)", r"\1\2"),
    (r"\bmlp\.linear_1\.", "mlp.0."),
    (r"\bmlp\.linear_2\.", "mlp.3."),
)
# Counters that others leave in a state dict and no network computes with: those of BatchNorm, of
# torch's AveragedModel and of thop's profiler.
COUNTERS = {"num_batches_tracked", "n_averaged", "total_ops", "total_params"}
AVERAGE = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?)(?![a-z])")
DEPTH = 5  # dictionaries in dictionaries that are looked into


@dataclass(frozen=True)
class Candidate:
    """A dictionary of a file, and the prefix under which most of a network's names are in it."""

    where: str
    """The keys that lead to it, joined by dots; empty for the whole file."""
    prefix: str
    weights: dict[str, Tensor]
    """What is under the prefix, without it."""
    others: tuple[str, ...]
    """Names that are not under the prefix."""
    fit: tuple[int, int]
    """How many of the network's tensors are in it, by name and shape, and by name alone."""

    def __str__(self) -> str:
        return f"{self.where} {self.prefix}".strip() or "the file itself"

    @property
    def average(self) -> bool:
        """Whether its name says that it is an average over training."""
        return bool(AVERAGE.search(str(self).lower()))


def find_weights(content: Any, own: Weights, path: Path) -> dict[str, Tensor]:
    """The weights of a network in what a file holds, under the network's names.

    own: the network's state dict. Of all dictionaries and prefixes, that which has most of the
    network's tensors is taken; of several equal ones an average over training, else the first. What
    was left out is logged in one line. path: of the file, for messages. Raises UserError if no
    dictionary has a tensor by name.
    """
    found = [
        candidate
        for where, weights in _tensor_dicts(content)
        for candidate in _candidates(where, weights, own)
    ]
    if not found:
        raise UserError(_without_weights(content, path))
    best = max(found, key=lambda candidate: (candidate.fit, candidate.average))
    equal = [str(other) for other in found if other.fit == best.fit and other is not best]
    outside = [name for name in best.others if not _is_counter(name)]
    if equal and best.fit[1]:
        log.info("%s: taking %s, not %s", path, best, " or ".join(equal))
    elif outside and best.fit[1]:
        log.info("%s: leaving out what is not the backbone's: %s", path, first_few(outside))
    return best.weights


def _tensor_dicts(content: Any, where: str = "", depth: int = DEPTH) -> Iterator:
    """Every dictionary with tensors by name: the keys that lead to it, and the tensors."""
    if depth == 0:
        return
    names: dict[str, Any] = {}
    if isinstance(content, Mapping):
        names = {name: value for name, value in content.items() if isinstance(name, str)}
        weights = {name: value for name, value in names.items() if isinstance(value, Tensor)}
        if weights:
            yield where, weights
    elif isinstance(content, list | tuple):  # such as [weights, optimizer]
        names = {str(index): value for index, value in enumerate(content)}
    for name, value in names.items():
        yield from _tensor_dicts(value, f"{where}.{name}".lstrip("."), depth - 1)


def _candidates(where: str, weights: Weights, own: Weights) -> Iterator[Candidate]:
    """A dictionary under each of the prefixes that have most of the network's names."""
    unwrapped = _unwrapped(weights, own)
    counts = Counter(
        prefix for name in unwrapped for prefix, rest in _splits(name) if rest in own
    ) or Counter([""])
    most = max(counts.values())
    for prefix in (prefix for prefix, count in counts.items() if count == most):
        inside = {
            name.removeprefix(prefix): value
            for name, value in unwrapped.items()
            if name.startswith(prefix)
        }
        shared = [name for name in own if name in inside]
        shaped = sum(inside[name].shape == own[name].shape for name in shared)
        others = tuple(name for name in unwrapped if not name.startswith(prefix))
        yield Candidate(where, prefix, inside, others, (shaped, len(shared)))


def _unwrapped(weights: Weights, own: Weights) -> dict[str, Tensor]:
    """The weights under today's names, without the parts that torch's wrappers add, unless the
    network has such parts itself."""
    parts = WRAPPERS - {part for name in own for part in name.split(".")}
    unwrapped = {}
    for name, value in weights.items():
        new = ".".join(part for part in name.split(".") if part not in parts)
        if new not in own:
            for old_part, new_part in RENAMED:
                new = re.sub(old_part, new_part, new)
        unwrapped[new] = value
    return unwrapped


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """A name cut into a prefix and the rest at its start and at each of its dots."""
    yield "", name
    for match in re.finditer(r"\.", name):
        yield name[: match.end()], name[match.end() :]


def _without_weights(content: Any, path: Path) -> str:
    objects = [*dict.fromkeys(_blanks(content))]
    if objects:
        return (
            f"{path} holds {first_few(objects)} instead of weights, and objects are not loaded for"
            " safety; where it was made, save the state dict: torch.save(model.state_dict(), FILE)"
        )
    return f"{path} holds no state dict, which --backbone expects"


def _blanks(content: Any, depth: int = DEPTH) -> Iterator[str]:
    """The classes of the objects in a file that were not loaded."""
    if isinstance(content, Blank):
        yield content.name
    elif isinstance(content, Mapping) and depth:
        for value in content.values():
            yield from _blanks(value, depth - 1)


def load_into(module: nn.Module, weights: Weights, path: Path, owner: str = "this network") -> None:
    """`load_state_dict(strict=True)`, but a mismatch raises UserError with one line that names the
    first differences. path: where the weights were read; owner: what the module is, for that line.

    Counters may be more or fewer: files older than torch 0.4.1 lack those of BatchNorm.
    """
    own = module.state_dict()
    shared = [name for name in own if name in weights]
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} here"
        for name in shared
        if weights[name].shape != own[name].shape
    ]
    types = [  # copying would round or drop a part without a word
        f"{name} is {str(weights[name].dtype).removeprefix('torch.')} there, not floating-point"
        for name in shared
        if own[name].is_floating_point() and not weights[name].is_floating_point()
    ]
    there = [name for name in weights if name not in own and not _is_counter(name)]
    here = [name for name in own if name not in weights and not _is_counter(name)]
    parts = [first_few(differing) for differing in (shapes, types) if differing]
    parts += [f"only there: {first_few(there)}"] if there else []
    parts += [f"only here: {first_few(here)}"] if here else []
    if parts:
        raise UserError(f"{path} does not fit {owner}: {'; '.join(parts)}")
    # BatchNorm's own counters are kept where the file has none
    try:
        module.load_state_dict({**own, **{name: weights[name] for name in shared}})
    except RuntimeError as error:  # such as of sparse tensors
        reason = textwrap.shorten(str(error), 300)
        raise UserError(f"the weights in {path} cannot be loaded: {reason}") from None


def check_finite(module: nn.Module, path: Path) -> None:
    """Raises UserError if a weight of a module is infinite or not a number.

    path: where the weights were read.
    """
    bad = [name for name, value in module.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UserError(
            f"the weights in {path} are not finite: {first_few(bad)}; the training that made them"
            " has diverged, so take an earlier checkpoint"
        )


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in COUNTERS
