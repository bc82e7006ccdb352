"""The multi-exit network: a backbone, untouched, with heads between its blocks."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from early_exit.errors import UserError
from early_exit.heads import HeadKind, build_head

FINAL = "final"


class Stage(nn.Module):
    """The backbone's part between two exits, with the later exit's head: what is timed, compiled
    and skipped as one.

    Maps features (B, C, H, W) (the first stage: images) to features (B, C', H', W') and logits
    (B, K). The last stage ends with the backbone's own classifier, so both are its logits.
    """

    def __init__(self, body: Sequence[nn.Module], head: nn.Module | None) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.head = head

    def forward(self, features: Tensor, with_logits: bool = True) -> tuple[Tensor, Tensor | None]:
        features = self.body(features)
        if self.head is None:
            return features, features
        return features, self.head(features) if with_logits else None


class MultiExitNetwork(nn.Module):
    """A plain network with early exits.

    backbone: the plain network; its parameters keep their names, under `backbone.`.
    units: its blocks in order, by name, the last being what classifies; applied one after the
        other they must equal `backbone(images)`, which is tried. What they train, and what differs
        between training and evaluation, must be modules of the backbone.
    places: the units followed by an exit; `layer1` stands for the last of `layer1.0`, `layer1.1`...
    head: the kind of head (`early_exit.heads.HEADS`) or a function from the features' shape and the
        number of classes to a module, for all exits; or one of these for each place.
    example: one image (1, 3, H, W), of which only the shape counts; a dry run on noise in eval mode
        gives each head its shape and moves no buffer.

    Raises UserError where the units are not the backbone, or a place or a kind is not known.

    `stages` are views of the same modules, not registered, so the state dict holds `backbone` and
    `heads` alone.
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
        cuts = resolve_places(places, list(units))  # place -> index of the unit before the exit
        kinds = kind_of_each(head, places)
        _refuse_foreign(backbone, units)
        shapes = _shapes_after(backbone, units, example)
        self.heads = nn.ModuleDict(
            {
                key: build_head(kinds[place], shapes[cut], num_classes)
                for (place, cut), key in zip(cuts.items(), _keys(cuts), strict=True)
            }
        )
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
        """How many exits there are, the final classifier included."""
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

    def compile_stages(self) -> None:
        """Compiles every stage on its own, for any number of rows; no name changes."""
        # All stages share one code object and so one limit of graphs; each needs about three (one
        # row, a few, many), and past the limit they would run uncompiled without a word.
        limit = max(torch.compiler.config.recompile_limit, 8 * len(self.stages))
        torch.compiler.config.recompile_limit = limit
        for stage in self.stages:
            stage.compile(dynamic=True)


def synchronise_norms(network: MultiExitNetwork) -> None:
    """Makes every BatchNorm one whose statistics are those of all processes' images: the same new
    module in the backbone and in the stage that is a view of it."""
    synchronised: dict[nn.Module, nn.Module] = {}
    for part in (network, *network.stages):
        for parent in list(part.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    if child not in synchronised:
                        made = nn.SyncBatchNorm.convert_sync_batchnorm(child)
                        synchronised |= {child: made, made: made}
                    setattr(parent, name, synchronised[child])


def kind_of_each(
    head: HeadKind | Sequence[HeadKind], places: Sequence[str]
) -> dict[str, HeadKind]:
    """The kind of head at each place, from one for all or one each."""
    kinds = (head,) if isinstance(head, str) or callable(head) else tuple(head)
    if len(kinds) == 1 or not places:
        kinds = kinds[:1] * len(places)
    if len(kinds) != len(places):
        raise UserError(
            f"got {len(kinds)} kinds of head for {len(places)} early exits; give one, or one each"
        )
    return dict(zip(places, kinds, strict=True))


def resolve_places(places: Sequence[str], unit_names: Sequence[str]) -> dict[str, int]:
    """Each place, in network order, with the index of the unit it follows.

    Raises UserError for a name that is no unit, the classifier, or a unit named twice.
    """
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
                f" {candidates[inside[-1]]}); leave one out"
            )
        cuts[place] = inside[-1]
    return dict(sorted(cuts.items(), key=lambda item: item[1]))


def _keys(places: Iterable[str]) -> list[str]:
    """The names of the heads in the state dict. Raises UserError where one is taken."""
    keys = [place.replace(".", "_") for place in places]
    for key in keys:
        if key == FINAL or keys.count(key) > 1 or hasattr(nn.ModuleDict, key):
            raise UserError(f"an exit cannot be called {key!r}, which is taken; rename its unit")
    return keys


def _refuse_foreign(backbone: nn.Module, units: Mapping[str, nn.Module]) -> None:
    """Raises UserError for a unit with something of its own that learns, or that training and
    evaluation do differently: only what the backbone has is trained, saved and switched."""
    own = set(backbone.modules())
    for name, unit in units.items():
        for module in set(unit.modules()) - own:
            keeps = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if keeps or isinstance(module, nn.modules.dropout._DropoutNd):
                raise UserError(
                    f"the unit {name} has a {type(module).__name__} that is no part of the backbone"
                    " and would be neither trained nor saved; make it one of the backbone's modules"
                )


def _shapes_after(
    backbone: nn.Module, units: Mapping[str, nn.Module], example: Tensor
) -> list[torch.Size]:
    """Shape of the features after each unit.

    Raises UserError where the units one after the other are not the backbone.
    """
    modes = {module: module.training for module in backbone.modules()}
    # noise: two networks may be alike on an even image
    noise = torch.rand(example.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    image = features = noise.to(example)
    shapes = []
    try:
        with torch.no_grad():
            whole = backbone.eval()(image)
            for unit in units.values():
                features = unit(features)
                shapes.append(features.shape)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if features.shape != whole.shape:
        raise UserError(
            f"the units one after the other give {tuple(features.shape)}, the backbone gives"
            f" {tuple(whole.shape)}; every step of its forward must be in a unit"
        )
    if whole.is_meta:  # nothing was computed
        return shapes
    far = (features - whole).abs().max() / whole.abs().max().clamp_min(1e-12)
    if far > 1e-3:
        raise UserError(
            f"the units one after the other are not the backbone: their logits differ by {far:.1%}"
            " of the largest; every step of its forward must be in a unit, sums with what went"
            " before and flattening too"
        )
    return shapes
