"""Draws why early exit works: a simple boundary answers the easy points, a curved one the rest.

A small network with two exits learns two interleaved moons. Its early exit can only draw a
straight line, its final exit any curve. The threshold is chosen on val; test is only reported.

    python docs-src/figures/decision_boundary.py
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor, nn

from early_exit import flags
from early_exit.cost import count_macs
from early_exit.losses import joint_loss
from early_exit.network import FINAL
from early_exit.policy import NEVER, Policy
from early_exit.records import Scores
from early_exit.thresholds import for_max_drop, shared_curve

OUT = Path(__file__).resolve().parents[2] / "docs-src/docs/imgs/decision_boundary.png"
SIZES = {"train": 600, "val": 2000, "test": 1000}
NOISE = 0.17  # standard deviation; a moon's radius is 1
STEPS = 600
MAX_DROP = 0.005  # accuracy the early exit may cost on val, a fraction
COLOURS = ("#0072B2", "#E69F00")  # blue and orange of Okabe and Ito, apart in grey too
MARKERS = ("o", "^")
SHADE = "#E4E4E4"
SPAN = ((-1.65, 2.65), (-1.25, 1.75))  # of the drawn axes, x and y


class MoonNet(nn.Module):
    """Two stages, each with a head. The first stage has no nonlinearity, so the early exit's
    boundary is a straight line; the second goes on from the first one's features."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Linear(2, width // 2),
                nn.Sequential(
                    nn.Tanh(),
                    nn.Linear(width // 2, width),
                    nn.Tanh(),
                    nn.Linear(width, width),
                    nn.Tanh(),
                ),
            ]
        )
        self.heads = nn.ModuleList([nn.Linear(width // 2, 2), nn.Linear(width, 2)])

    def forward(self, points: Tensor) -> list[Tensor]:
        """Logits of both exits, N tensors of shape (B, K), of points (B, 2)."""
        features, logits = points, []
        for stage, head in zip(self.stages, self.heads, strict=True):
            features = stage(features)
            logits.append(head(features))
        return logits


@dataclass(frozen=True)
class Result:
    """What a trained network with its policy does on one split."""

    early: float
    """Accuracy of the early exit where it answers every point."""
    final: float
    """Accuracy of the final exit where it answers every point."""
    both: float
    """Accuracy of the policy."""
    leaving: float
    """Share of the points that leave early."""
    macs: float
    """Multiply-adds a point, on average over the policy's exits."""


def make_moons(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two half circles that reach into each other, with noise: points (B, 2), classes (B,)."""
    target = torch.arange(count) % 2
    angle = torch.rand(count, generator=generator) * torch.pi
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    points = torch.where(target[:, None] == 0, upper, lower)
    return points + NOISE * torch.randn(count, 2, generator=generator), target


def train(points: Tensor, target: Tensor) -> MoonNet:
    """A network trained jointly, both exits with weight 1, on the whole sample at each step."""
    net = MoonNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        joint_loss(net(points), target, weights=(1.0, 1.0)).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def exit_macs(net: MoonNet) -> tuple[int, int, int]:
    """MACs of a point that leaves early, of one that goes on, and of the network without an early
    head."""
    point = torch.zeros(1, 2)
    features = net.stages[0](point)
    early = count_macs(nn.Sequential(net.stages[0], net.heads[0]), point)
    rest = count_macs(nn.Sequential(net.stages[1], net.heads[1]), features)
    return early, early + rest, count_macs(net.stages[0], point) + rest


@torch.inference_mode()
def score(net: MoonNet, points: Tensor, target: Tensor, policy: Policy) -> Scores:
    """What the policy's criterion makes of both exits, on every point."""
    scores, answers = [], []
    for exit_index, logits in enumerate(net(points)):
        answer, sure, _ = policy.score(exit_index, logits)
        scores.append(sure)
        answers.append(answer.argmax(dim=-1))
    return Scores(torch.stack(scores, 1).numpy(), torch.stack(answers, 1).numpy(), target.numpy())


def judge(scored: Scores, policy: Policy, macs: Sequence[int]) -> Result:
    """Accuracies, the share that leaves early and the cost on one split."""
    exit_index, right = scored.exit_index(policy), scored.right
    return Result(
        early=right[:, 0].mean(),
        final=right[:, 1].mean(),
        both=right[np.arange(len(exit_index)), exit_index].mean(),
        leaving=(exit_index == 0).mean(),
        macs=np.take(macs, exit_index).mean(),
    )


def evaluate_grid(net: MoonNet, policy: Policy) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The drawn area as a grid of points: x, y, and early score, early class, final class there."""
    x, y = np.meshgrid(np.linspace(*SPAN[0], 600), np.linspace(*SPAN[1], 450))
    points = torch.from_numpy(np.stack([x.ravel(), y.ravel()], axis=1)).float()
    scored = score(net, points, torch.zeros(len(points), dtype=torch.long), policy)
    values = (scored.scores[:, 0], scored.answers[:, 0], scored.answers[:, 1])
    return x, y, [value.reshape(x.shape) for value in values]


def draw_points(
    axes: Axes, points: Tensor, target: Tensor, chosen: np.ndarray, filled: bool, size: float
) -> None:
    """The chosen points, one colour and marker for each class."""
    for label, (colour, marker) in enumerate(zip(COLOURS, MARKERS, strict=True)):
        rows = chosen & (target.numpy() == label)
        axes.scatter(
            *points.numpy()[rows].T,
            s=size,
            marker=marker,
            edgecolors=colour,
            facecolors=colour if filled else "white",
            linewidths=0.9,
        )


def draw(
    net: MoonNet,
    policy: Policy,
    splits: dict[str, tuple[Tensor, Tensor]],
    titles: Sequence[str],
    captions: Sequence[str],
) -> Figure:
    """Three panels: the early exit, the final exit, and which test points leave where."""
    x, y, (early_score, early_class, final_class) = evaluate_grid(net, policy)
    unsure = early_score < policy.thresholds[0]
    figure = Figure(figsize=(15, 5.05), facecolor="white")
    panels = figure.subplots(1, 3)
    points, target = splits["train"]
    everyone = np.ones(len(target), bool)
    for axes in panels[:2]:
        draw_points(axes, points, target, everyone, filled=True, size=13)
    points, target = splits["test"]
    leaves = score(net, points, target, policy).exit_index(policy) == 0
    draw_points(panels[2], points, target, leaves, filled=False, size=36)
    draw_points(panels[2], points, target, ~leaves, filled=True, size=36)
    for axes in (panels[0], panels[2]):
        axes.contourf(x, y, early_score, levels=[0, policy.thresholds[0]], colors=[SHADE], zorder=0)
    together = np.where(unsure, final_class, early_class)
    for axes, answers in zip(panels, (early_class, final_class, together), strict=True):
        axes.contour(x, y, answers, levels=[0.5], colors="black", linewidths=3)
    for axes, name in zip(panels, ("train", "train", "test"), strict=True):
        corner = {"ha": "right", "va": "bottom", "transform": axes.transAxes}
        axes.text(0.98, 0.03, f"{name} points", color="#555555", **corner)
    for axes, title, caption in zip(panels, titles, captions, strict=True):
        axes.set_title(title, fontweight="bold", pad=9)
        axes.set_xlabel(caption, labelpad=9)
        axes.set(xticks=[], yticks=[], xlim=SPAN[0], ylim=SPAN[1], aspect="equal")
    figure.legend(
        handles=legend_handles(),
        loc="lower center",
        ncols=6,
        frameon=False,
        markerscale=1.4,
        columnspacing=1.5,
        handletextpad=0.5,
    )
    figure.subplots_adjust(left=0.01, right=0.99, top=0.915, bottom=0.175, wspace=0.04)
    return figure


def legend_handles() -> list[Line2D | Patch]:
    """What the markers, the line and the shade mean."""
    dots = [
        ("class A", MARKERS[0], COLOURS[0], COLOURS[0]),
        ("class B", MARKERS[1], COLOURS[1], COLOURS[1]),
        ("left early", "o", "black", "white"),
        ("went on", "o", "black", "black"),
    ]
    handles = [
        Line2D([], [], ls="", marker=marker, mec=edge, mfc=face, label=label)
        for label, marker, edge, face in dots
    ]
    handles.insert(2, Line2D([], [], color="black", linewidth=3, label="boundary"))
    handles.insert(3, Patch(color=SHADE, label="hard: early exit unsure"))
    return handles


def parser() -> flags.Parser:
    """The figure's flags."""
    parser = flags.build_parser(
        "decision_boundary.py", "python docs-src/figures/decision_boundary.py [flags]", __doc__
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the PNG (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: 0)")
    return parser


def main() -> None:
    """Trains, chooses the threshold on val, prints the numbers and draws."""
    args = parser().parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    splits = {name: make_moons(count, generator) for name, count in SIZES.items()}
    net = train(*splits["train"])
    *macs, plain = exit_macs(net)
    undecided = Policy(exit_names=("early", FINAL), thresholds=(NEVER,), criterion="max_prob")
    curve = shared_curve(score(net, *splits["val"], undecided), (True,), macs)
    threshold = for_max_drop(curve, MAX_DROP)
    policy = dataclasses.replace(undecided, thresholds=(threshold,))
    print(f"seed {args.seed}: threshold {threshold:.3f}, at most {MAX_DROP:.1%} lost on val")
    print(
        f"MACs of a point: leaving early {macs[0]}, going on {macs[1]},"
        f" without an early exit {plain}"
    )
    for name in ("val", "test"):
        result = judge(score(net, *splits[name], policy), policy, macs)
        print(
            f"{name} ({SIZES[name]} points): right at early exit {result.early:.2%},"
            f" final exit {result.final:.2%}, together {result.both:.2%};"
            f" leaving early {result.leaving:.2%}, MACs on average {result.macs:.0f}"
            f" ({result.macs / plain:.1%} of {plain})"
        )
    titles = (
        "1. Early exit: a straight line",
        "2. Final exit: a curve",
        f"3. Together: {result.leaving:.0%} leave early",
    )
    captions = (
        f"{macs[0]} multiply-adds, {result.early:.1%} right on test",
        f"{plain} multiply-adds, {result.final:.1%} right on test",
        f"{result.macs:.0f} on average, {result.both:.1%} right on test",
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.size": 16, "axes.titlesize": 17, "axes.labelsize": 16}):
        # no software version in the file: the same picture is then the same bytes
        draw(net, policy, splits, titles, captions).savefig(
            args.out, dpi=120, metadata={"Software": None}
        )


if __name__ == "__main__":
    main()
