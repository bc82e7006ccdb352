"""Draws why early exit works: a straight line classifies the easy points, a curve the others.

A small network with two exits learns two interleaved moons. The boundary of its early exit can only
be a straight line, that of its final exit any curve. The threshold is chosen on val; test is only
reported.

    python docs-src/figures/decision_boundary.py
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(
        0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    )
    from early_exit.cli.border import run

    run("decision_boundary", "decision_boundary.py")

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor, nn

from early_exit.choosing.curve import for_max_drop, shared_curve
from early_exit.choosing.outcome import Outcome, outcome_of
from early_exit.choosing.record import Scores
from early_exit.cli import flags
from early_exit.evaluation import plots
from early_exit.inference.policy import NEVER, Policy
from early_exit.model.cost import Cost, count_macs
from early_exit.model.losses import joint_loss
from early_exit.model.network import FINAL

IMAGE = Path(__file__).resolve().parents[1] / "docs/imgs/decision_boundary.png"
EXIT_NAMES = ("early", FINAL)
SIZES = {"train": 600, "val": 2000, "test": 1000}
NOISE = 0.17  # standard deviation; a moon's radius is 1
STEPS = 600
MAX_DROP = 0.005  # accuracy that may be lost on val, a fraction
COLOURS = ("#0072B2", "#E69F00")  # blue and orange of Okabe and Ito, distinct in grey too
MARKERS = ("o", "^")
SHADE = "#E4E4E4"
SPAN = ((-1.65, 2.65), (-1.25, 1.75))  # of the drawn axes, x and y

Moons = tuple[Tensor, Tensor]
"""Points (B, 2) and their classes (B,)."""


class MoonNet(nn.Module):
    """Two stages, each with a head. The first stage has no nonlinearity, so the early exit's
    boundary is a straight line; the second stage takes the first one's features."""

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
        """Logits of both exits, two tensors of shape (B, 2), for points (B, 2)."""
        features, logits = points, []
        for stage, head in zip(self.stages, self.heads, strict=True):
            features = stage(features)
            logits.append(head(features))
        return logits


def make_moons(count: int, generator: torch.Generator) -> Moons:
    """Two interleaved half circles with noise, as many points of each class."""
    target = torch.arange(count) % 2
    angle = torch.rand(count, generator=generator) * torch.pi
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    points = torch.where(target[:, None] == 0, upper, lower)
    return points + NOISE * torch.randn(count, 2, generator=generator), target


def train(points: Tensor, target: Tensor) -> MoonNet:
    """Trains jointly, both losses with weight 1, on the whole sample at each step."""
    net = MoonNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        joint_loss(net(points), target, weights=(1.0, 1.0)).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def moon_cost(net: MoonNet) -> Cost:
    """What the stages and heads cost per point."""
    point = torch.zeros(1, 2)
    features = net.stages[0](point)
    first, head = count_macs(net.stages[0], point), count_macs(net.heads[0], features)
    last = count_macs(nn.Sequential(net.stages[1], net.heads[1]), features)
    return Cost(
        exit_names=EXIT_NAMES,
        stage_macs=(first, last),
        head_macs=(head, 0),
        backbone_params=0,
        head_params=(0, 0),
    )


@torch.inference_mode()
def score(net: MoonNet, points: Tensor, target: Tensor, policy: Policy) -> Scores:
    """The criterion's score and the answer of both exits on every point."""
    scores, answers = [], []
    for exit_index, logits in enumerate(net(points)):
        answer, exit_score, _ = policy.score(exit_index, logits)
        scores.append(exit_score)
        answers.append(answer.argmax(dim=-1))
    return Scores(torch.stack(scores, 1).numpy(), torch.stack(answers, 1).numpy(), target.numpy())


def choose_on_val(net: MoonNet, val: Moons, cost: Cost) -> Policy:
    """The policy with the cheapest threshold that loses at most `MAX_DROP` on val."""
    never = Policy(exit_names=EXIT_NAMES, thresholds=(NEVER,), criterion="max_prob")
    curve = shared_curve(score(net, *val, never), (True,), cost.cumulative())
    return never.with_threshold(for_max_drop(curve, MAX_DROP))


@dataclass(frozen=True)
class Grid:
    """The area of the panels as a grid of points. All fields: (450, 600)."""

    x: np.ndarray
    y: np.ndarray
    early_score: np.ndarray
    early_class: np.ndarray
    final_class: np.ndarray


def evaluate_grid(net: MoonNet, policy: Policy) -> Grid:
    """Scores and answers over the area of the panels."""
    x, y = np.meshgrid(np.linspace(*SPAN[0], 600), np.linspace(*SPAN[1], 450))
    points = torch.from_numpy(np.stack([x.ravel(), y.ravel()], axis=1)).float()
    scored = score(net, points, torch.zeros(len(points), dtype=torch.long), policy)
    values = (scored.scores[:, 0], scored.answers[:, 0], scored.answers[:, 1])
    return Grid(x, y, *(value.reshape(x.shape) for value in values))


def draw_points(
    axes: Axes, points: Tensor, target: Tensor, chosen: np.ndarray, filled: bool, size: float
) -> None:
    """Draws the points of the mask `chosen`, one colour and marker for each class."""
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


def draw_panels(
    panels: Sequence[Axes],
    net: MoonNet,
    policy: Policy,
    splits: Mapping[str, Moons],
    exited: np.ndarray,
) -> None:
    """Points and boundaries of the early exit, the final exit, and both together.

    exited: (test points,) bool, whether each exits early.
    """
    points, target = splits["train"]
    for axes in panels[:2]:
        draw_points(axes, points, target, np.ones(len(target), bool), filled=True, size=13)
    points, target = splits["test"]
    draw_points(panels[2], points, target, exited, filled=False, size=36)
    draw_points(panels[2], points, target, ~exited, filled=True, size=36)
    grid, threshold = evaluate_grid(net, policy), policy.thresholds[0]
    for axes in (panels[0], panels[2]):
        axes.contourf(
            grid.x, grid.y, grid.early_score, levels=[0, threshold], colors=[SHADE], zorder=0
        )
    together = np.where(grid.early_score < threshold, grid.final_class, grid.early_class)
    for axes, classes in zip(panels, (grid.early_class, grid.final_class, together), strict=True):
        axes.contour(grid.x, grid.y, classes, levels=[0.5], colors="black", linewidths=3)
    for axes, name in zip(panels, ("train", "train", "test"), strict=True):
        corner = {"ha": "right", "va": "bottom", "transform": axes.transAxes}
        axes.text(0.98, 0.03, f"{name} points", color="#555555", **corner)
        axes.set(xticks=[], yticks=[], xlim=SPAN[0], ylim=SPAN[1], aspect="equal")


def draw(net: MoonNet, splits: Mapping[str, Moons], test: Outcome) -> Figure:
    """Three panels: the early exit, the final exit, and the exit that each test point takes."""
    early, final = test.scored.correct.mean(axis=0)
    exited, macs = test.exit_shares[0], test.cost.cumulative()[0]
    plain, mean_macs = test.cost.plain_macs, test.point.macs_share * test.cost.plain_macs
    titles = (
        "1. Early exit: a straight line",
        "2. Final exit: a curve",
        f"3. Together: {exited:.0%} exit early",
    )
    captions = (
        f"{macs} multiply-adds, {early:.1%} correct on test",
        f"{plain} multiply-adds, {final:.1%} correct on test",
        f"{mean_macs:.0f} on average, {test.point.accuracy:.1%} correct on test",
    )
    figure = Figure(figsize=(15, 5.05), facecolor="white")
    panels = figure.subplots(1, 3)
    draw_panels(panels, net, test.policy, splits, test.exit_index == 0)
    for axes, title, caption in zip(panels, titles, captions, strict=True):
        axes.set_title(title, fontweight="bold", pad=9)
        axes.set_xlabel(caption, labelpad=9)
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
    """Explains the markers, the line and the shade."""
    dots = [
        ("class A", MARKERS[0], COLOURS[0], COLOURS[0]),
        ("class B", MARKERS[1], COLOURS[1], COLOURS[1]),
        ("exited early", "o", "black", "white"),
        ("continued", "o", "black", "black"),
    ]
    handles = [
        Line2D([], [], ls="", marker=marker, mec=edge, mfc=face, label=label)
        for label, marker, edge, face in dots
    ]
    handles.insert(2, Line2D([], [], color="black", linewidth=3, label="boundary"))
    handles.insert(3, Patch(color=SHADE, label="early exit unsure"))
    return handles


def describe(name: str, outcome: Outcome) -> str:
    """The outcome on one split, in one line."""
    early, final = outcome.scored.correct.mean(axis=0)
    point, plain = outcome.point, outcome.cost.plain_macs
    return (
        f"{name} ({len(outcome.exit_index)} points): correct at the early exit {early:.2%}, at the"
        f" final exit {final:.2%}, together {point.accuracy:.2%};"
        f" {outcome.exit_shares[0]:.2%} exit early, MACs on average"
        f" {point.macs_share * plain:.0f} ({point.macs_share:.1%} of {plain})"
    )


def parser() -> flags.Parser:
    """The script's flags."""
    parser = flags.build_parser(
        "decision_boundary.py", "python docs-src/figures/decision_boundary.py [flags]", __doc__
    )
    parser.add_argument("--out", type=Path, default=IMAGE, help=f"the PNG (default {IMAGE.name})")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default 0)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, chooses the threshold on val, prints the numbers and draws the figure."""
    args = parser().parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    splits = {name: make_moons(count, generator) for name, count in SIZES.items()}
    net = train(*splits["train"])
    cost = moon_cost(net)
    policy = choose_on_val(net, splits["val"], cost)
    early, whole = cost.cumulative()
    threshold = policy.thresholds[0]
    print(f"seed {args.seed}: threshold {threshold:.3f}, at most {MAX_DROP:.1%} lost on val")
    print(
        f"MACs per point: {early} to exit early, {whole} to continue, {cost.plain_macs} without an"
        " early exit"
    )
    val, test = (
        outcome_of(score(net, *splits[name], policy), policy, cost) for name in ("val", "test")
    )
    print(f"{describe('val', val)}\n{describe('test', test)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with plots.own_settings({"font.size": 16, "axes.titlesize": 17, "axes.labelsize": 16}):
        # without the software's version, the same picture gives the same bytes
        draw(net, splits, test).savefig(args.out, dpi=120, metadata={"Software": None})
