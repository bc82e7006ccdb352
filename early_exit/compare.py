"""Compares evaluations: one table and one figure over several runs, seeds of one group in one row.

    python -m early_exit.compare runs/a runs/b                        every evaluation of two runs
    python -m early_exit.compare runs/a runs/b --eval budget-50-max_prob      one of each
    python -m early_exit.compare runs/a-0 runs/a-1 runs/a-2           seeds: mean ± deviation
    python -m early_exit.compare runs/a-0 runs/a-1 --each             the same, one row per run
    python -m early_exit.compare runs/a/eval/risk1 runs/b --labels certified cheap

Runs whose settings differ only in the seed, evaluated under the same name, form one group. Policies
were chosen on val when the runs were evaluated; test is only reported.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    from early_exit.cli.border import run

    run("early_exit.compare", "early_exit.compare")

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from early_exit.cli import flags
from early_exit.errors import UserError
from early_exit.evaluation import comparison, comparison_plot
from early_exit.evaluation.groups import Group, group_runs
from early_exit.evaluation.labels import labelled
from early_exit.evaluation.stored import Evaluation, find_reports, read_evaluation
from early_exit.system.files import atomic_directory, write_text

FILES = ("table.md", "table.csv", "table.json", comparison.FIGURE)


def default_directory(groups: Sequence[Group]) -> Path:
    """Where a comparison is written by default: compare/LABELS beside the first run."""
    labels = [re.sub(r"[^a-z0-9.]+", "-", group.label.lower()).strip("-.") for group in groups]
    words = "-vs-".join(labels)[:80].strip("-.")
    first = Path(os.path.abspath(groups[0].first.run))
    return first.parent / "compare" / (words or "comparison")


def write(groups: Sequence[Group], out: Path, command: str, with_figure: bool) -> None:
    """Writes the files of a comparison into `out`, all or none, replacing an earlier comparison.

    Raises UserError if `out` has other files.
    """
    others = {path.name for path in out.iterdir()} - set(FILES) if out.is_dir() else set()
    if others or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} holds other files than a comparison's; choose another --out")
    with atomic_directory(out) as partial:
        write_text(partial / "table.md", comparison.to_markdown(groups, command, with_figure))
        write_text(partial / "table.csv", comparison.to_csv(groups))
        write_text(partial / "table.json", comparison.to_json(groups))
        if with_figure:
            comparison_plot.draw(groups, partial / comparison.FIGURE)


def parser() -> flags.Parser:
    """The flags of a comparison."""
    parser = flags.build_parser(
        "early_exit.compare", "python -m early_exit.compare RUN [RUN ...] [flags]", __doc__
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run directory, an evaluation in it (RUN/eval/NAME), or a report.json",
    )
    parser.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="NAME",
        help="use only the evaluation of this name from run directories; repeatable (default: all)",
    )
    parser.add_argument("--each", action="store_true", help="one row per run, no means over seeds")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="names of the rows, in their order (default: the settings in which the runs differ)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"directory for {', '.join(FILES[:3])} and {FILES[3]}; replaces an earlier comparison"
        " there (default: compare/LABELS beside the first run)",
    )
    parser.add_argument("--no-plots", action="store_true", help="write no figure")
    return parser


def read_evaluations(runs: Sequence[Path], names: Sequence[str]) -> list[Evaluation]:
    """The evaluations of the command line, each once.

    names: the evaluations of run directories to use; default: all. Raises UserError if the data
    sets differ, or if no run has an evaluation of a name.
    """
    paths = {path.resolve(): path for run in runs for path in find_reports(run, names)}
    found = [read_evaluation(path) for path in paths.values()]
    first = found[0]
    for other in found:
        if other.dataset != first.dataset:
            raise UserError(
                f"{first.path} is on {first.dataset} and {other.path} on {other.dataset}; accuracy"
                " on different data sets cannot be compared"
            )
    unknown = set(names) - {evaluation.name for evaluation in found}
    if unknown:
        raise UserError(f"no run has an evaluation {' or '.join(sorted(unknown))}; check --eval")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the evaluations, writes the comparison and prints the table."""
    args = parser().parse_args(argv)
    evaluations = read_evaluations(args.runs, args.eval)
    groups = labelled(group_runs(evaluations, args.each), args.labels)
    out = Path(os.path.abspath(args.out)) if args.out else default_directory(groups)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "early_exit.compare", *map(str, words)])
    write(groups, out, command, with_figure=not args.no_plots)
    print("\n\n".join([comparison.table(groups), *comparison.notes(groups)]))
    print(f"\ntable:  {out / 'table.md'}, .csv and .json")
    if not args.no_plots:
        print(f"figure: {out / comparison.FIGURE}")
