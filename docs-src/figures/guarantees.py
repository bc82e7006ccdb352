"""Whether guarantees hold: a recorded test set as the population, certified again and again.

    python docs-src/figures/guarantees.py runs/resnet20-mixed
    python docs-src/figures/guarantees.py runs/resnet20-mixed --risk 2 --confidence 90

The run must have been evaluated (its records of val and test are read). A fifth of val fixes the
list of policies; each draw takes certifying images from test with replacement, and what it accepts
has a risk that is known, since test is all there is. Draws docs-src/docs/imgs/guarantees.png.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from early_exit import flags
from early_exit.disk import written_whole
from early_exit.choosing import Goal, fit_and_certify, ladder
from early_exit.guarantees import losses_of, on_average, with_confidence
from early_exit.plots import BLUE, GREEN, ORANGE, STYLE
from early_exit.records import ExitRecord, score_record

IMAGE = Path(__file__).resolve().parent.parent / "docs" / "imgs" / "guarantees.png"


def naive(lost: np.ndarray, risk: float) -> int:
    """As far as the certifying images themselves allow: no guarantee."""
    return int((np.maximum.accumulate(lost.mean(axis=1)) <= risk).sum()) - 1


def parser() -> flags.Parser:
    """The flags."""
    parser = flags.build_parser(
        "guarantees.py", "python docs-src/figures/guarantees.py RUN [flags]", __doc__
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run directory that was evaluated"
    )
    parser.add_argument("--risk", type=float, default=1.0, help="points (default 1)")
    parser.add_argument("--confidence", type=float, default=95.0, help="percent (default 95)")
    parser.add_argument("--images", type=int, default=4000, help="certifying (default 4000)")
    parser.add_argument("--draws", type=int, default=2000, help="default 2000")
    return parser


def main() -> None:
    """Reads, draws and prints."""
    args = parser().parse_args()
    risk, confidence = args.risk / 100, args.confidence / 100

    val, test = (ExitRecord.load(args.run / "records" / f"{name}-off") for name in ("val", "test"))
    cost, (rows, _) = val.cost, fit_and_certify(val)
    policies = ladder(val.subset(rows, "val", ""), Goal(risk=risk), cost)
    scored = score_record(test, policies[0])
    lost = losses_of(scored, policies, "wrong")
    true, shares = lost.mean(axis=1), np.array(cost.shares(policies[0].enabled))
    macs = np.array([shares[scored.exit_index(policy)].mean() for policy in policies])

    methods = {
        f"Learn then Test, {args.confidence:g} %": (
            lambda drawn: with_confidence(drawn, risk, confidence), BLUE
        ),
        "conformal risk control, on average": (lambda drawn: on_average(drawn, risk), GREEN),
        "no guarantee": (lambda drawn: naive(drawn, risk), ORANGE),
    }
    accepted = {name: [] for name in methods}
    rng = np.random.default_rng(0)
    for _ in range(args.draws):
        drawn = lost[:, rng.integers(len(test), size=args.images)]
        for name, (method, _) in methods.items():
            accepted[name].append(method(drawn))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4))
        axes = figure.add_subplot()
        for name, (_, colour) in methods.items():
            found = np.sort(true[accepted[name]])
            label = f"{name}: above in {100 * (found > risk).mean():.1f} % of draws"
            axes.plot(
                100 * found, 100 * np.arange(1, args.draws + 1) / args.draws, color=colour, lw=2,
                label=f"{label}, mean {100 * found.mean():.2f}",
            )
            print(
                f"{label}, mean {100 * found.mean():.2f}, at"
                f" {100 * macs[accepted[name]].mean():.1f} % of the MACs"
            )
        axes.axvline(args.risk, color="black", ls="--", lw=1.5)
        axes.set_xlabel("risk of the accepted policy, %")
        axes.set_ylabel(f"% of {args.draws:,} draws at most there")
        axes.set_title(f"{args.images:,} certifying images, a risk of {args.risk:g} % allowed")
        figure.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 0.0))
        with written_whole(IMAGE) as file:
            figure.savefig(file, format="png")


if __name__ == "__main__":
    main()
