"""Times exit heads beside the stage they end, in runtimes, in one run.

    python benchmarks/heads.py                        ResNet-56, heads after layer2.0 and layer3.0
    python benchmarks/heads.py --runtime torch onnxruntime openvino openvino-bf16
    python benchmarks/heads.py --arch resnet50 --exits layer1 layer2 --heads separable pooled

Needs no data: the time does not depend on the weights. The seconds of a head are those of its stage
with the head less those of the same stage with a head that computes nothing, taken in turns.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("heads", "heads.py")

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cifar10.networks
import imagenet.networks
from early_exit.cli import flags
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.runtimes.table import find_runtime
from early_exit.model.heads import HEADS, HeadKind
from early_exit.model.network import MultiExitNetwork

CRITERION = "max_prob"
TURN = 0.005  # seconds that a turn takes at least, by repeating calls


class NoHead(nn.Module):
    """A head that computes nothing: one value of the features is the logit of every class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, features: Any) -> Tensor:
        last = features[-1] if isinstance(features, tuple) else features
        value = last[(slice(None), slice(1), *[0] * (last.ndim - 2))]  # (B, 1)
        return value.expand(-1, self.num_classes)


@dataclass(frozen=True)
class Seconds:
    """What a stage and its heads take for one batch."""

    stage: float
    """Without a head: the median over the turns."""
    heads: Mapping[str, np.ndarray]
    """What each kind of head adds, turn by turn."""


def build_network(arch: str, exits: Sequence[str], head: HeadKind, side: int) -> MultiExitNetwork:
    """A network for images of this side, in eval mode."""
    torch.manual_seed(0)
    small = arch in cifar10.networks.BACKBONES
    backbone: Any = (
        cifar10.networks.build_backbone(arch, shape=(3, side, side))
        if small
        else imagenet.networks.build_backbone(arch, 1000, side)
    )
    network = MultiExitNetwork(
        backbone,
        backbone.units() if small else imagenet.networks.units_of(arch, backbone),
        exits,
        num_classes=10 if small else 1000,
        example=torch.zeros(1, 3, side, side),
        head=head,
    )
    return network.to(memory_format=torch.channels_last).eval()


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """The mean over `repeats` calls."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def time_heads(calls: Mapping[str, Callable[[], Any]], without: str, turns: int) -> Seconds:
    """The seconds of one stage with each head, in turns. without: the key of the one with none."""
    for call in calls.values():
        seconds_of(call, 3)  # the warm-up
    repeats = 1 + int(TURN / seconds_of(calls[without], 3))
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        start = turn % len(names)  # none is always the first
        for name in names[start:] + names[:start]:
            seconds[name].append(seconds_of(calls[name], repeats))
    found = {name: np.array(values) for name, values in seconds.items()}
    stage = found.pop(without)
    added = {name: values - stage for name, values in found.items()}
    return Seconds(float(np.median(stage)), added)


def time_places(
    networks: Mapping[str, RuntimeNetwork], images: Tensor, turns: int
) -> Iterator[tuple[str, Seconds]]:
    """Every place with the seconds of its stage and heads. networks: by head, the first has none.

    images: one batch.
    """
    without, *_ = networks
    bare = networks[without]
    features = bare.runtime.array(images)
    with bare.runtime.context():
        for index, place in enumerate(bare.network.exit_names[:-1]):
            segments = {
                name: network.segment(index, index, CRITERION) for name, network in networks.items()
            }
            calls = {
                name: lambda segment=segment, features=features: segment(features, 1.0, None)
                for name, segment in segments.items()
            }
            yield place, time_heads(calls, without, turns)
            features = segments[without](features, 1.0, None)[0]


def parser() -> flags.Parser:
    """The benchmark's flags."""
    parser = flags.build_parser("heads.py", "python benchmarks/heads.py [flags]", __doc__)
    parser.add_argument(
        "--arch", default="resnet56", help="backbone, of cifar10 or imagenet (default resnet56)"
    )
    parser.add_argument(
        "--exits",
        nargs="+",
        default=["layer2.0", "layer3.0"],
        metavar="PLACE",
        help="places of the heads; a stage begins after the place before (default layer2.0"
        " layer3.0)",
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        choices=HEADS,
        default=["conv", "linear", "pooled"],
        metavar="KIND",
        help=f"kinds of head: {', '.join(HEADS)} (default conv linear pooled)",
    )
    parser.add_argument(
        "--runtime",
        nargs="+",
        default=["torch"],
        metavar="NAME",
        help="runtimes, such as torch, onnxruntime, openvino, openvino-bf16 (default torch)",
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[1, 64], metavar="N", help="default 1 64"
    )
    parser.add_argument(
        "--image-size", type=int, help="side in pixels (default 32 for cifar10, 224 for imagenet)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--turns", type=int, default=50, help="turns of each head (default 50)")
    return parser


def cell(added: np.ndarray, stage: float) -> str:
    """What a head adds, as a cell of the table."""
    low, middle, high = np.quantile(added, (0.25, 0.5, 0.75))
    return f"{1000 * middle:+.3f} ± {500 * (high - low):.3f} ({100 * middle / stage:+.0f} %)"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    args = parser().parse_args(argv)
    flags.check_at_least(args, 1, "batch_sizes", "turns", "threads")
    torch.set_num_threads(args.threads)
    small = args.arch in cifar10.networks.BACKBONES
    side = args.image_size or (32 if small else 224)
    kinds: dict[str, HeadKind] = {
        "without": lambda _shape, num_classes: NoHead(num_classes),
        **{kind: kind for kind in args.heads},
    }
    networks = {
        name: build_network(args.arch, args.exits, kind, side) for name, kind in kinds.items()
    }
    images = torch.randn(max(2, *args.batch_sizes), 3, side, side)
    print(
        f"{args.arch}, {side} x {side} pixels, {args.threads} threads, torch {torch.__version__},"
        f" median of {args.turns} turns ± half the interquartile range"
    )
    columns = [f"{kind} head, ms (% of the stage)" for kind in args.heads]
    print("| " + " | ".join(["runtime", "batch size", "place", "stage, ms", *columns]) + " |")
    print("| --- | ---: | --- |" + " ---: |" * (1 + len(columns)))
    for name in args.runtime:
        runtime = find_runtime(name, "cpu", args.threads)
        built = {key: RuntimeNetwork(net, runtime, images[:2]) for key, net in networks.items()}
        for batch_size in args.batch_sizes:
            for place, seconds in time_places(built, images[:batch_size], args.turns):
                cells = [cell(added, seconds.stage) for added in seconds.heads.values()]
                stage = f"{1000 * seconds.stage:.3f}"
                print("| " + " | ".join([name, str(batch_size), place, stage, *cells]) + " |")
