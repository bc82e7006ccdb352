"""Tests whether guarantees hold, by certifying many times on images drawn from a recorded test set.

    python docs-src/figures/guarantees.py runs/resnet20-mixed
    python docs-src/figures/guarantees.py runs/resnet20-mixed --risk 2 --confidence 90

The run must have been evaluated, because its records of val and test are read. The candidate
policies are fitted on a fifth of val. Each draw takes certifying images from test with replacement.
The true risk of the policy that a draw accepts is known, because test is treated as the whole
population. Prints the results and draws docs-src/docs/imgs/guarantees.png.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(
        0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    )
    from early_exit.cli.border import run

    run("guarantees", "guarantees.py")

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from run_records import RunRecords

from early_exit.choosing.choice import candidates, fit_and_certify
from early_exit.choosing.goals import Risk
from early_exit.choosing.guarantees import losses_of, on_average, with_confidence
from early_exit.choosing.outcome import outcome_of
from early_exit.choosing.record import score_record
from early_exit.cli import flags
from early_exit.evaluation import plots

IMAGE = Path(__file__).resolve().parents[1] / "docs/imgs/guarantees.png"
COLOURS = (plots.BLUE, plots.GREEN, plots.ORANGE)

Method = Callable[[np.ndarray], int]
"""The losses (policies, images) of the certifying images -> the index of the accepted policy."""


@dataclass(frozen=True)
class Population:
    """Every candidate policy on all of test.

    lost: (policies, images) bool; macs_share: (policies,).
    """

    lost: np.ndarray
    macs_share: np.ndarray

    @property
    def risk(self) -> np.ndarray:
        """The true risk of each policy, (policies,)."""
        return self.lost.mean(axis=1)


def read_population(run: Path, risk: float) -> Population:
    """The candidates for a guarantee, fitted on a fifth of val, on all of test."""
    records = RunRecords.load(run)
    cost, (fit, _) = records.val.cost, fit_and_certify(records.val)
    policies = candidates(records.val.subset(fit, "val", ""), Risk(risk), cost)
    scored = score_record(records.test, policies[0])
    return Population(
        losses_of(scored, policies, "wrong"),
        np.array([outcome_of(scored, policy, cost).point.macs_share for policy in policies]),
    )


def without_guarantee(lost: np.ndarray, risk: float) -> int:
    """The last policy for which the certifying images themselves lose at most `risk`."""
    return int((np.maximum.accumulate(lost.mean(axis=1)) <= risk).sum()) - 1


def methods(risk: float, confidence: float) -> dict[str, Method]:
    """The ways to accept a policy, by name."""
    return {
        f"Learn then Test, {100 * confidence:g} %": (
            lambda lost: with_confidence(lost, risk, confidence)
        ),
        "conformal risk control, on average": lambda lost: on_average(lost, risk),
        "no guarantee": lambda lost: without_guarantee(lost, risk),
    }


def accept(
    population: Population, ways: Mapping[str, Method], images: int, draws: int
) -> dict[str, list[int]]:
    """The policies that each method accepts, one per draw of `images` certifying images."""
    accepted = {name: [] for name in ways}
    rng = np.random.default_rng(0)
    for _ in range(draws):
        drawn = population.lost[:, rng.integers(population.lost.shape[1], size=images)]
        for name, method in ways.items():
            accepted[name].append(method(drawn))
    return accepted


def parser() -> flags.Parser:
    """The script's flags."""
    parser = flags.build_parser(
        "guarantees.py", "python docs-src/figures/guarantees.py RUN [flags]", __doc__
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory that was evaluated")
    parser.add_argument(
        "--risk", type=float, default=1.0, help="risk that is allowed, in percent (default 1)"
    )
    parser.add_argument("--confidence", type=float, default=95.0, help="percent (default 95)")
    parser.add_argument(
        "--images", type=int, default=4000, help="certifying images per draw (default 4000)"
    )
    parser.add_argument("--draws", type=int, default=2000, help="number of draws (default 2000)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Draws certifying images, prints what is accepted and draws the figure."""
    args = parser().parse_args(argv)
    risk, confidence = args.risk / 100, args.confidence / 100
    population = read_population(args.run, risk)
    accepted = accept(population, methods(risk, confidence), args.images, args.draws)
    with plots.figure(IMAGE, (7, 4)) as (figure, axes):
        for (name, indices), colour in zip(accepted.items(), COLOURS, strict=True):
            found = np.sort(population.risk[indices])
            label = (
                f"{name}: above in {100 * (found > risk).mean():.1f} % of draws,"
                f" mean {100 * found.mean():.2f}"
            )
            share = 100 * np.arange(1, args.draws + 1) / args.draws
            axes.plot(100 * found, share, color=colour, lw=2, label=label)
            print(f"{label}, at {100 * population.macs_share[indices].mean():.1f} % of the MACs")
        axes.axvline(args.risk, color="black", ls="--", lw=1.5)
        axes.set_xlabel("true risk of the accepted policy, %")
        axes.set_ylabel(f"% of {args.draws:,} draws with at most this risk")
        axes.set_title(f"{args.images:,} certifying images, allowed risk {args.risk:g} %")
        figure.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 0.0))
