"""Ways to spend a budget of multiply-adds, on one record.

    python docs-src/figures/budgets.py runs/resnet20-mixed --budgets 60 70 80
    python docs-src/figures/budgets.py runs/resnet56-frozen6 --val-from test

One threshold for all exits, one for each, and MSDNet's geometric shares (arXiv:1703.09844), whose
ratio is searched for the budget. The run must have been evaluated (its records are read).
Thresholds come from val and are shown on test, over ten cuts as in criteria.py. Prints a table.
"""

import dataclasses

import numpy as np
from criteria import over_cuts, record_parser, records

from early_exit import flags
from early_exit.choosing import Goal, choose, outcome
from early_exit.cost import Cost
from early_exit.policy import Policy
from early_exit.records import ExitRecord, score_record
from early_exit.thresholds import geometric

RATIOS = np.geomspace(1e-3, 1e3, 601)


def parser() -> flags.Parser:
    """The flags."""
    parser = record_parser("budgets.py", __doc__)
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[50, 65, 80],
        help="percent of the plain network (default 50 65 80)",
    )
    return parser


def msdnet(val: ExitRecord, budget: float, cost: Cost) -> Policy:
    """The dearest geometric shares that keep to the budget on val."""
    policy = choose(val, Goal(budget=budget), cost)
    scored, best = score_record(val, policy), None
    for ratio in RATIOS:
        each = geometric(scored, policy.enabled, ratio)
        trial = dataclasses.replace(policy, thresholds=each)
        share = outcome(scored, trial, cost)[0].macs_share
        if share <= budget and (best is None or share >= best[0]):
            best = share, trial
    return best[1]


def main() -> None:
    """Reads and prints."""
    args = parser().parse_args()
    runs = records(args)
    ways = {
        "one for all": lambda record, cost: choose(record, Goal(budget=budget / 100), cost),
        "one each": lambda record, cost: choose(
            record, Goal(budget=budget / 100, per_exit=True), cost
        ),
        "geometric shares": lambda record, cost: msdnet(record, budget / 100, cost),
    }
    print("| budget | thresholds | test | MACs |\n| ---: | --- | ---: | ---: |")
    for budget in args.budgets:
        for name, way in ways.items():
            accuracy, _, share = over_cuts(runs, way)
            print(f"| {budget:g} % | {name} | {accuracy} % | {share} % |")


if __name__ == "__main__":
    main()
