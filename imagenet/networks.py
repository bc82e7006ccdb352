"""torchvision's classification networks with exits.

One small function per family lists the blocks of a network in order, by name. Operations between
two blocks are part of the block before. Parameters keep torchvision's names.
"""

import difflib
import functools
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlock
from torchvision.models.efficientnet import FusedMBConv, MBConv

from early_exit.errors import UserError
from early_exit.model import cost
from early_exit.model.network import MultiExitNetwork

Units = dict[str, nn.Module]

DEFAULT_HEAD = "separable"
DEFAULT_SHARES = (0.19, 0.44)  # of the MACs, as after layer1 and layer2 of ResNet-50


def resnet_units(net: models.ResNet) -> Units:
    """ResNet, ResNeXt, Wide ResNet: `layer1.0` .. `layer4.2`."""
    units = {"stem": nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)}
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        units |= _children(stage, getattr(net, stage))
    return units | {"classifier": nn.Sequential(net.avgpool, nn.Flatten(), net.fc)}


def vgg_units(net: models.VGG) -> Units:
    """`block1.0` .. `block5.3`: one convolution each, and the pooling after the last of a block."""
    groups: list[list[nn.Module]] = []  # each begins with a convolution
    for module in net.features:
        if isinstance(module, nn.Conv2d):
            groups.append([])
        groups[-1].append(module)
    units: Units = {}
    block, index = 1, 0
    for group in groups:
        units[f"block{block}.{index}"] = nn.Sequential(*group)
        pooled = isinstance(group[-1], nn.MaxPool2d)
        block, index = (block + 1, 0) if pooled else (block, index + 1)
    return units | {"classifier": nn.Sequential(net.avgpool, nn.Flatten(), net.classifier)}


def features_units(net: nn.Module) -> Units:
    """MobileNet, EfficientNet and ConvNeXt: `features.1`, or `features.1.0` if the part consists of
    several blocks."""
    units: Units = {}
    for name, part in net.features.named_children():
        blocks = all(isinstance(block, MBConv | FusedMBConv | CNBlock) for block in part.children())
        units |= _children(f"features.{name}", part) if blocks else {f"features.{name}": part}
    pool = getattr(net, "avgpool", nn.AdaptiveAvgPool2d(1))  # MobileNetV2 pools in its forward
    # ConvNeXt's classifier normalises the features and flattens them itself
    flatten = [] if isinstance(net, models.ConvNeXt) else [nn.Flatten()]
    return units | {"classifier": nn.Sequential(pool, *flatten, net.classifier)}


def densenet_units(net: models.DenseNet) -> Units:
    """`denseblock1.0` .. `denseblock4.15`, with `transition1` .. `transition3` between."""
    parts = net.features
    units: Units = {"stem": nn.Sequential(parts.conv0, parts.norm0, parts.relu0, parts.pool0)}
    for name, part in parts.named_children():
        if name.startswith("denseblock"):
            for index, layer in enumerate(part.children()):
                units[f"{name}.{index}"] = DenseLayer(layer)
        elif name.startswith("transition"):
            units[name] = part
    pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return units | {"classifier": nn.Sequential(parts.norm5, *pool, net.classifier)}


def regnet_units(net: models.RegNet) -> Units:
    """`block1.0` .. `block4.2`."""
    units: Units = {"stem": net.stem}
    for stage, blocks in net.trunk_output.named_children():
        units |= _children(stage, blocks)
    return units | {"classifier": nn.Sequential(net.avgpool, nn.Flatten(), net.fc)}


def vit_units(net: models.VisionTransformer) -> Units:
    """`encoder.0` .. `encoder.11`: features are tokens (B, 1 + patches, C)."""
    units = {"stem": Tokens(net), **_children("encoder", net.encoder.layers)}
    return units | {"classifier": nn.Sequential(net.encoder.ln, ClassToken(), net.heads)}


def _children(prefix: str, blocks: nn.Module) -> Units:
    return {f"{prefix}.{index}": block for index, block in enumerate(blocks.children())}


class DenseLayer(nn.Module):
    """A layer of a dense block: its output is appended to its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features, self.layer(features)], dim=1)


class Tokens(nn.Module):
    """The part of a ViT before its encoder: images (B, 3, H, W) to tokens (B, 1 + patches, C)."""

    def __init__(self, vit: models.VisionTransformer) -> None:
        super().__init__()
        self.conv_proj, self.class_token = vit.conv_proj, vit.class_token
        self.pos_embedding, self.dropout = vit.encoder.pos_embedding, vit.encoder.dropout

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(len(images), -1, -1)
        tokens = torch.cat([class_token, patches], dim=1)
        return self.dropout(tokens + self.pos_embedding)


class ClassToken(nn.Module):
    """Selects the first token: (B, T, C) to (B, C)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


FAMILIES: dict[str, Callable[[nn.Module], Units]] = {
    r"(wide_)?res(net|next)\d+.*": resnet_units,
    r"vgg\d+.*": vgg_units,
    r"mobilenet_v[23].*|efficientnet_.*|convnext_.*": features_units,
    r"densenet\d+": densenet_units,
    r"regnet_.*": regnet_units,
    r"vit_.*": vit_units,
}


def list_archs() -> list[str]:
    """Names of all supported networks."""
    names = models.list_models(module=models)
    return [name for name in names if _family_of(name)]


def _family_of(arch: str) -> str | None:
    """The key of `FAMILIES` that matches a network's name."""
    return next((pattern for pattern in FAMILIES if re.fullmatch(pattern, arch)), None)


def units_of(arch: str, net: nn.Module) -> Units:
    """The blocks of torchvision's `arch` in order. Applied one after the other they equal its
    forward."""
    return FAMILIES[_family_of(arch)](net)


def public_accuracy(arch: str) -> dict[str, float]:
    """The accuracy on ImageNet's val at 224 pixels that torchvision states for the first weights of
    the networks in the family of `arch` that need at most 1.5 times its operations."""
    family = _family_of(arch)
    first_weights = {
        name: next(iter(models.get_model_weights(name)))
        for name in list_archs()
        if _family_of(name) == family
    }
    limit = 1.5 * first_weights[arch].meta["_ops"]
    return {
        name: weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100
        for name, weights in first_weights.items()
        if weights.transforms().crop_size == [224] and weights.meta["_ops"] <= limit
    }


def build_backbone(arch: str, num_classes: int = 1000, image_size: int = 224) -> nn.Module:
    """torchvision's network called `arch`, untrained.

    image_size: side of the images in pixels, which only a ViT depends on. Raises UserError for a
    network that is not supported, and for a side that a ViT cannot divide into its patches.
    """
    check_arch(arch)
    options = {}
    if arch.startswith("vit_"):
        patch = int(arch.rpartition("_")[2])
        if image_size % patch:
            raise UserError(
                f"{arch} divides images into patches of {patch} pixels, got images of"
                f" {image_size}; crop them to a multiple of {patch}"
            )
        options = {"image_size": image_size}
    return models.get_model(arch, weights=None, num_classes=num_classes, **options)


def check_arch(arch: str) -> None:
    """Raises UserError for a network that is not supported."""
    known = list_archs()
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"there is no network {arch!r}; {hint}--list-archs lists all")


def build_network(
    arch: str = "resnet50",
    exits: tuple[str, ...] | None = None,
    head: str | Sequence[str] = DEFAULT_HEAD,
    num_classes: int = 1000,
    image_size: int = 224,
) -> MultiExitNetwork:
    """`arch` with exits after the named blocks; None: its default places; (): the plain network.

    head: the kind of head, one for all exits or one per exit. image_size: side, in pixels, of the
    images that costs are counted for; a ViT takes no other size. Raises UserError for an unknown
    network, place or kind of head.
    """
    backbone = build_backbone(arch, num_classes, image_size)
    return MultiExitNetwork(
        backbone,
        units_of(arch, backbone),
        default_places(arch) if exits is None else exits,
        head=head,
        num_classes=num_classes,
        example=torch.zeros(1, 3, image_size, image_size),
    )


def places(arch: str) -> tuple[str, ...]:
    """The places of `arch` where an exit saves multiply-adds, if its head costs none."""
    return tuple(place_shares(arch))


def default_places(arch: str) -> tuple[str, ...]:
    """The two places whose shares of the MACs are nearest to 19 and 44 %; one if they coincide."""
    shares = place_shares(arch)
    nearest = [min(shares, key=lambda place: abs(shares[place] - at)) for at in DEFAULT_SHARES]
    return tuple(dict.fromkeys(nearest))


@functools.cache
def place_shares(arch: str) -> dict[str, float]:
    """The share of the MACs before each place, in order, for images of 224x224 pixels
    (`early_exit.model.cost.place_shares`)."""
    try:
        with torch.device("meta"):  # no weights are allocated
            net = build_backbone(arch)
    except NotImplementedError:  # RegNet computes its widths with tensors
        with torch.random.fork_rng(devices=[]):  # the weights are those of the seed, asked or not
            net = build_backbone(arch).to("meta")
    return cost.place_shares(units_of(arch, net), torch.empty(1, 3, 224, 224, device="meta"))


def describe_archs() -> Iterator[str]:
    """Lines with the places of every network, their shares of the MACs, and the default places."""
    for arch in list_archs():
        shares, default = place_shares(arch), default_places(arch)
        yield f"{arch} (default: {' '.join(default)})"
        listed = ", ".join(f"{place} {share:.1%}" for place, share in shares.items())
        yield textwrap.fill(listed, 98, initial_indent="    ", subsequent_indent="    ")
