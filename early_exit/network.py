"""The multi-exit network: a backbone, untouched, with heads between its blocks."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

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
    example: one image (1, 3, H, W), of which shape, dtype and device count; a dry run on noise, in
        eval mode, gives each head its shape and moves no number.

    Raises UserError where the units are not the backbone, where a head or the backbone does not
    make `num_classes` logits, and for a place or a kind that is not known.

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
        features = _features_after(backbone, units, example)
        _refuse_other_logits(features[-1], num_classes, "the backbone", "one image")
        self.heads = nn.ModuleDict(
            {
                key: build_head(kinds[place], features[cut].shape, num_classes)
                for (place, cut), key in zip(cuts.items(), _keys(cuts), strict=True)
            }
        )
        _try_heads(self.heads, [features[cut] for cut in cuts.values()], num_classes)
        _refuse_batch_statistics(self)
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
    kept = {id(tensor) for tensor in (*backbone.parameters(), *backbone.buffers())}
    for name, unit in units.items():
        for module in set(unit.modules()) - own:
            keeps = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            foreign = any(id(tensor) not in kept for tensor in keeps)
            if foreign or isinstance(module, nn.modules.dropout._DropoutNd):
                raise UserError(
                    f"the unit {name} has a {type(module).__name__} that is no part of the backbone"
                    " and would be neither trained nor saved; make it one of the backbone's modules"
                )


def _refuse_batch_statistics(network: nn.Module) -> None:
    """Raises UserError for a BatchNorm whose answer about an image depends on the others in its
    batch also in evaluation: who is left there depends on the policy."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UserError(
                f"{name} normalises by the batch at hand (track_running_stats=False), so that an"
                " image's answer would depend on the others; let it keep running statistics"
            )


def _features_after(
    backbone: nn.Module, units: Mapping[str, nn.Module], example: Tensor
) -> list[Tensor]:
    """What the units make of noise, in eval mode, with weights that are not theirs: the shapes
    count.

    Raises UserError where the units one after the other are not the backbone. That is tried with
    other weights, which are then put back: a fresh BatchNorm, or a layer that begins at 0, changes
    nothing.
    """
    noise = torch.rand(example.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    image = noise.to(example)
    with torch.no_grad(), _kept(backbone):
        backbone.eval()
        _shuffle(backbone)
        features = _walk(units, image)
        if image.is_meta:  # nothing is computed
            return features
        whole, last = backbone(image), features[-1]
    if last.shape != whole.shape:
        raise UserError(
            f"the units one after the other give {tuple(last.shape)}, the backbone gives"
            f" {tuple(whole.shape)}; every step of its forward must be in a unit"
        )
    close = torch.allclose(last, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    if whole.isfinite().all() and not close:  # a thousand untrained layers may overflow
        raise UserError(
            "the units one after the other are not the backbone: with the same weights they say"
            " something else; every step of its forward must be in a unit, sums with what went"
            " before and flattening too"
        )
    return features


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Puts a module's numbers and modes back, to the bit."""
    modes = {part: part.training for part in module.modules()}
    values = [(tensor, tensor.clone()) for tensor in (*module.parameters(), *module.buffers())]
    try:
        yield
    finally:
        for tensor, value in values:
            tensor.copy_(value)
        for part, mode in modes.items():
            part.training = mode


def _walk(units: Mapping[str, nn.Module], features: Tensor) -> list[Tensor]:
    """The features after each unit."""
    found = []
    for name, unit in units.items():
        try:
            features = unit(features)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"the unit {name} does not take what comes before it ({_shape(features)}):"
                f" {' '.join(str(error).split())}"
            ) from error
        found.append(features)
    return found


def _shape(features: object) -> str:
    return str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__


def _shuffle(network: nn.Module) -> None:
    """Changes every number of a network a little, about as large as it was or as large as it could
    be where it is next to nothing. Variances grow, lest what a deep network sums up overflows."""
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


def _try_heads(heads: nn.ModuleDict, features: Sequence[Tensor], num_classes: int) -> None:
    """Raises UserError for a head that does not make logits of the features (1, ...) at its
    place."""
    for (name, head), before in zip(heads.items(), features, strict=True):
        with torch.no_grad(), _kept(head):
            said = _walk({f"head of {name}": head.eval()}, before)[0]
        _refuse_other_logits(said, num_classes, f"the head of {name}", _shape(before))


def _refuse_other_logits(said: object, num_classes: int, who: str, what: str) -> None:
    """Raises UserError if what `who` made of `what`, one image's, is not (1, `num_classes`)."""
    expected = str((1, num_classes))
    if _shape(said) != expected:
        raise UserError(f"{who} makes {_shape(said)} of {what}; logits {expected} are expected")
