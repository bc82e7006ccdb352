"""Trains the same network in several ways and compares the accuracy for half of its cost.

    python benchmarks/ablations.py --seeds 0 1 --teacher FILE       all arms
    python benchmarks/ablations.py --arms base distill --seeds 0 1 2 3 4
    python benchmarks/ablations.py --table                          what is trained so far

Each arm is ten epochs of the fast recipe (cifar10/configs/fast.yaml) on a narrow network with three
early exits, and a change. The figure of merit was fixed before the first run: accuracy on val at
half of the plain network's multiply-adds, exits taken, beside that of the final exit. Differences
from `base` are paired by seed. Runs that are there are resumed, or used as they are.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("ablations", "ablations.py")

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from early_exit.cli import flags
from early_exit.errors import Failed, UserError

ROOT = Path(__file__).resolve().parent.parent
EXITS = ("--exits", "group1", "group2.0", "group2")
FAST = str(ROOT / "cifar10" / "configs" / "fast.yaml")
BASE = ("--config", FAST, "--epochs", "10", *EXITS)
EVALUATION = "budget-50-max_prob"


def weights(*shares: float, total: float = 2.0) -> tuple[str, ...]:
    """The flags for loss weights in proportion to `shares`, of this sum: the rate suits it."""
    return ("--loss-weights", *(f"{total * share / sum(shares):.4g}" for share in shares))


EQUAL, HALVED = weights(1, 1, 1, 1), weights(1, 1, 1, 1, total=1.0)
ARMS: dict[str, tuple[str, ...]] = {
    "base": EQUAL,
    "weights-0.1": weights(0.1, 0.1, 0.1, 1),
    "weights-0.3": weights(0.3, 0.3, 0.3, 1),
    "weights-3": weights(3, 3, 3, 1),
    "weights-by-depth": weights(1, 2, 3, 4),
    "start-0.01": (*EQUAL, "--set", "loss.start=0.01"),
    "mixed": (*EQUAL, "--regime", "mixed", "--epochs", "5", "--backbone-epochs", "5"),
    # the early exits' two losses have together the weight that they had alone
    "distill": (*weights(1, 1, 1, 2, total=1.25), "--distill", "1"),
    "teacher": (*HALVED, "--set", "loss.teacher={teacher}"),
    "first-block": (*EQUAL, "--exits", "group1.0", "group2.0", "group3.0"),
}
"""The flags of each arm, which follow those of `BASE`."""


def parser() -> flags.Parser:
    """The script's flags."""
    parser = flags.build_parser("ablations.py", "python benchmarks/ablations.py [flags]", __doc__)
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(ARMS),
        metavar="NAME",
        help=f"arms to train (default: all): {', '.join(ARMS)}",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="seeds (default: 0 1)"
    )
    parser.add_argument(
        "--arch", default="airbench_slim", metavar="NAME", help="network (default: %(default)s)"
    )
    parser.add_argument(
        "--teacher",
        type=flags.absolute,
        metavar="FILE",
        help="checkpoint of the teacher, for the arm teacher",
    )
    parser.add_argument(
        "--out",
        type=flags.absolute,
        metavar="DIR",
        help="directory of the runs, of one --arch and one --teacher (default:"
        " runs/ablations-ARCH)",
    )
    parser.add_argument(
        "--data",
        type=flags.absolute,
        metavar="DIR",
        help="directory of CIFAR-10, as for trainer.py",
    )
    parser.add_argument("--table", action="store_true", help="train nothing, print the table")
    parser.add_argument("--threads", default="1", metavar="N", help="CPU threads (default: 1)")
    return parser


def train_and_evaluate(directory: Path, args: argparse.Namespace, arm: str, seed: int) -> None:
    """Trains one run, or what is left of it, and chooses the policy for half of the cost."""
    if (directory / "eval" / EVALUATION / "report.json").exists():
        return
    machine = ["--threads", args.threads, "--amp", "bf16"]
    if args.data:
        machine += ["--data", args.data]
    trainer = [
        "trainer.py",
        *(word.format(teacher=args.teacher) for word in (*BASE, *ARMS[arm])),
        *("--arch", args.arch, "--seed", str(seed)),
        *("--save-dir", str(directory), "--resume", "auto"),
    ]
    evaluation = ["eval.py", str(directory), "--budget", "50", "--no-live", "--name", EVALUATION]
    for script, *rest in (trainer, evaluation):
        command = [sys.executable, str(ROOT / "cifar10" / script), *rest, *machine]
        if subprocess.run(command).returncode:
            raise Failed(f"the arm {arm} stopped with seed {seed}; the last lines say why")


def check_arch(out: Path, arch: str) -> None:
    """Raises UserError if `out` has runs of another network."""
    for path in out.glob("*-seed*/config.yaml"):
        found = yaml.safe_load(path.read_text())["model"]["arch"]
        if found != arch:
            raise UserError(f"{path.parent} is of {found}, not of {arch}; name another --out")


def merits(out: Path, arm: str, seeds: Sequence[int]) -> dict[int, tuple[float, float, float]]:
    """By seed, what is evaluated: accuracy on val at half of the cost, the share of the plain
    network's multiply-adds that it took, and the accuracy of the final exit on val."""
    found = {}
    for seed in seeds:
        path = out / f"{arm}-seed{seed}" / "eval" / EVALUATION / "report.json"
        if path.exists():
            report = json.loads(path.read_text())
            last = (out / f"{arm}-seed{seed}" / "metrics.jsonl").read_text().splitlines()[-1]
            final = json.loads(last)["val_top1"]["final"]
            found[seed] = (report["val"]["accuracy"], report["val"]["macs_share"], final)
    return found


def mean(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation of fractions, in percent."""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.2f}{spread}"


def table(out: Path, arms: Sequence[str], seeds: Sequence[int]) -> str:
    """What is trained and evaluated so far, in Markdown."""
    lines = [
        "| arm | seeds | accuracy at half the cost, % | against base | MACs, % | final exit, %"
        " | against base |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = merits(out, "base", seeds)
    for arm in arms:
        runs = merits(out, arm, seeds)
        if not runs:
            continue
        half, share, final = zip(*runs.values(), strict=True)
        both = [seed for seed in runs if seed in base]
        pairs = [
            mean([runs[seed][column] - base[seed][column] for seed in both], "+") if both else ""
            for column in (0, 2)
        ]
        cells = [arm, str(len(runs)), mean(half), pairs[0], mean(share), mean(final), pairs[1]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is not there yet, one run after the other, and prints the table."""
    args = parser().parse_args(argv)
    out = Path(args.out or ROOT / "runs" / f"ablations-{args.arch}")
    unknown = [arm for arm in args.arms if arm not in ARMS]
    if unknown:
        raise UserError(f"there is no arm {unknown[0]!r}; choose of {', '.join(ARMS)}")
    if "teacher" in args.arms and not (args.teacher or args.table):
        raise UserError("the arm teacher needs --teacher FILE, the checkpoint of a trained run")
    check_arch(out, args.arch)
    if not args.table:
        for seed in args.seeds:
            for arm in args.arms:
                train_and_evaluate(out / f"{arm}-seed{seed}", args, arm, seed)
                print(table(out, args.arms, args.seeds), flush=True)
    print(table(out, args.arms, args.seeds))
