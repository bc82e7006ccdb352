"""The multi-exit network: an untouched backbone with heads between its blocks."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.errors import UserError
from early_exit.model.features import Features, describe_shape, shape_of
from early_exit.model.heads import HeadKind, build_head

FINAL = "final"


class Stage(nn.Module):
    """The part of the backbone between two exits, with the head of the later exit.

    Maps features (B, C, H, W), or a tuple of such tensors, to the next features and logits (B, K).
    The first stage takes images. The last stage ends with the backbone's own classifier, so its
    features are its logits.
    """

    def __init__(self, body: Sequence[nn.Module], head: nn.Module | None) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.head = head

    def forward(self, features: Features, with_logits: bool = True) -> tuple[Any, Any]:
        features = self.body(features)
        if self.head is None:
            return features, features
        return features, self.head(features) if with_logits else None


class MultiExitNetwork(nn.Module):
    """A plain network with early exits.

    backbone: the plain network; its parameters keep their names, under `backbone.`. Those that
        require no gradient now stay fixed in every phase of training. If it has a method
        `init_from_images(batches)`, a training that starts without trained weights calls it once,
        with an iterator over batches of normalised train images (B, 3, H, W).
    units: its blocks in order, by name, the last one being the classifier. Applied one after the
        other they must equal `backbone(images)`; `early_exit.model.checks.check_network` tests it.
        Whatever they train, and whatever differs between training and evaluation, must be a module
        of the backbone.
    places: the units followed by an exit; `layer1` stands for the last of `layer1.0`, `layer1.1`...
    head: the kind of head (`early_exit.model.heads.HEADS`), or a function from the shape of the
        features and the number of classes to a module; one for all exits, or one per place.
    example: one image (1, 3, H, W), of which only shape, dtype and device count. A dry run in eval
        mode gives each head the shape of its features; it changes no weight.

    Raises UserError for an unknown place or kind of head, for units that do not fit together, and
    if the backbone does not give `num_classes` logits.

    `stages` are views of the same modules, not registered, so the state dict holds only `backbone`
    and `heads`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        units: Mapping[str, nn.Module],
        places: Sequence[str],
        *,
        num_classes: int,
        example: Tensor,
        head: HeadKind | Sequence[HeadKind] = "conv",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fixed = frozenset(
            name for name, parameter in backbone.named_parameters() if not parameter.requires_grad
        )
        self.units = dict(units)  # a plain dict: registering would rename the parameters
        cuts = resolve_places(places, list(units))  # place -> index of the unit before the exit
        kinds = head_kinds(head, places)
        with evaluation_mode(backbone), torch.no_grad():
            features = run_units(units, torch.zeros_like(example), cuts.values())
        if describe_shape(features[-1]) != str((1, num_classes)):
            raise UserError(
                f"the backbone gives {describe_shape(features[-1])} for one image; expected logits"
                f" {(1, num_classes)}"
            )
        self.heads = nn.ModuleDict(
            {
                key: build_head(kinds[place], shape_of(features[cut]), num_classes)
                for (place, cut), key in zip(cuts.items(), _keys(cuts), strict=True)
            }
        )
        self.cuts = cuts
        self.exit_names = (*cuts, FINAL)
        self.num_classes = num_classes
        self.image_shape = tuple(example.shape[1:])
        modules = list(units.values())
        starts = [0, *(cut + 1 for cut in cuts.values())]
        ends = [*starts[1:], len(modules)]
        # a plain list: registering the stages would give every parameter a second name
        self.stages = [
            Stage(modules[start:end], head)
            for start, end, head in zip(starts, ends, [*self.heads.values(), None], strict=True)
        ]

    @property
    def num_exits(self) -> int:
        """The number of exits, the final classifier included."""
        return len(self.stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of every exit, shallowest first.

        images: (B, 3, H, W), normalised. Returns N tensors of shape (B, K).
        """
        features, logits = images, []
        for stage in self.stages:
            features, exit_logits = stage(features)  # (B, C, H', W'), (B, K)
            logits.append(exit_logits)
        return logits


def run_units(
    units: Mapping[str, nn.Module], images: Features, cuts: Collection[int] = ()
) -> list[Features]:
    """The features after each unit.

    cuts: the indices of the units that are followed by an exit. Raises UserError for a unit that
    cannot take its input, and for features at an exit that are neither a tensor nor a tuple of
    tensors.
    """
    features, outputs = images, []
    for index, (name, unit) in enumerate(units.items()):
        try:
            features = unit(features)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"the unit {name} does not accept the output of the one before it"
                f" ({describe_shape(features)}): {' '.join(str(error).split())}"
            ) from error
        if index in cuts and not _are_tensors(features):
            raise UserError(
                f"the unit {name}, which an exit follows, gives {describe_shape(features)};"
                " expected a tensor or a tuple of tensors"
            )
        outputs.append(features)
    return outputs


def _are_tensors(features: Any) -> bool:
    parts = features if isinstance(features, tuple) else (features,)
    return all(isinstance(part, Tensor) for part in parts)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode within the context, each part's own mode after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def convert_sync_batchnorm(network: MultiExitNetwork) -> None:
    """Replaces every BatchNorm by SyncBatchNorm: the same new module in the backbone and in the
    stage that is a view of it."""
    converted: dict[nn.Module, nn.Module] = {}
    for part in (network, *network.stages):
        for parent in list(part.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    if child not in converted:
                        new = nn.SyncBatchNorm.convert_sync_batchnorm(child)
                        converted |= {child: new, new: new}
                    setattr(parent, name, converted[child])


def head_kinds(head: HeadKind | Sequence[HeadKind], places: Sequence[str]) -> dict[str, HeadKind]:
    """The kind of head at each place, from one for all or one each."""
    kinds = (head,) if isinstance(head, str) or callable(head) else tuple(head)
    if len(kinds) == 1 or not places:
        kinds = kinds[:1] * len(places)
    if len(kinds) != len(places):
        raise UserError(
            f"got {len(kinds)} kinds of head for {len(places)} early exits; give one, or one each"
        )
    return dict(zip(places, kinds, strict=True))


def resolve_places(places: Sequence[str] | None, unit_names: Sequence[str]) -> dict[str, int]:
    """Each place, in network order, with the index of the unit it follows.

    Raises UserError for a name that is not a unit, for the classifier, for a unit named twice, and
    if `places` is None.
    """
    if places is None:
        raise UserError("the places of the exits are None; name the units that exits follow")
    cuts: dict[str, int] = {}
    candidates = list(unit_names[:-1])
    for place in places:
        inside = [
            index
            for index, name in enumerate(candidates)
            if name == place or name.startswith(f"{place}.")
        ]
        if not inside:
            known = [*dict.fromkeys(name.partition(".")[0] for name in candidates), *candidates]
            close = difflib.get_close_matches(place, known, n=1, cutoff=0.7)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"there is no place {place!r} for an exit; {hint}"
                f"places are {', '.join(dict.fromkeys(known))}"
            )
        twin = next((name for name, cut in cuts.items() if cut == inside[-1]), None)
        if twin is not None:
            raise UserError(
                f"--exits names one place twice ({twin} and {place} both follow"
                f" {candidates[inside[-1]]}); remove one"
            )
        cuts[place] = inside[-1]
    return dict(sorted(cuts.items(), key=lambda item: item[1]))


def _keys(places: Iterable[str]) -> list[str]:
    """The names of the heads in the state dict. Raises UserError for a name that is taken."""
    keys = [place.replace(".", "_") for place in places]
    for key in keys:
        if key == FINAL or keys.count(key) > 1 or hasattr(nn.ModuleDict, key):
            raise UserError(f"an exit cannot be named {key!r}, which is taken; rename its unit")
    return keys
