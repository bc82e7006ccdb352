"""Compares evaluations: one table and one figure over several runs, seeds of one group in one row.

    python -m early_exit.compare runs/a runs/b                        every evaluation of two runs
    python -m early_exit.compare runs/a runs/b --eval budget-50-max_prob      one of each
    python -m early_exit.compare runs/a-0 runs/a-1 runs/a-2           seeds: mean ± deviation
    python -m early_exit.compare runs/a-0 runs/a-1 --each             the same, one row per run
    python -m early_exit.compare runs/a/eval/risk1 runs/b --labels certified cheap
    python -m early_exit.compare runs/*                               all, if on one data set
    python -m early_exit.compare runs/* --points benchmarks/literature.yaml
    python -m early_exit.compare runs/mine --statics benchmarks/statics.yaml

Besides the table it makes one figure: accuracy against multiply-adds, and against seconds in each
runtime that something was timed in. Multi-exit runs are curves; plain runs (--exits none), the
public networks that the reports name and the networks of --statics are single marks; points of the
literature, from --points, are hollow ones. A second table tells for each static network which
policy is as accurate and what it saves (`early_exit.evaluation.savings`).

Runs whose settings differ only in the seed, evaluated under the same name, form one group. Policies
were chosen on val when the runs were evaluated; test is only reported. Of several RUNs, as from
runs/*, comparisons are skipped, and what has no evaluation is named on standard error.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    from early_exit.cli.border import run

    run("early_exit.compare", "early_exit.compare")

import hashlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from early_exit.cli import flags
from early_exit.errors import UserError
from early_exit.evaluation import comparison, comparison_files, comparison_plot
from early_exit.evaluation.comparison import Comparison
from early_exit.evaluation.decoration import optional
from early_exit.evaluation.groups import Group, group_runs
from early_exit.evaluation.labels import labelled
from early_exit.evaluation.literature import read_points
from early_exit.evaluation.panels import Panel, panels_of
from early_exit.evaluation.statics import listed_networks, static_networks
from early_exit.evaluation.stored import Evaluation, find_reports, read_evaluation
from early_exit.system.directories import atomic_directory
from early_exit.system.disk_errors import is_writable
from early_exit.system.files import write_text
from early_exit.system.names import is_hidden, is_system_name
from early_exit.system.text import in_a_line
from early_exit.trained import evaluations, trained_since

log = logging.getLogger(__name__)

PROG = "early_exit.compare"
MAX_NAME = 80  # of a default directory
LEFT = (".nfs", ".fuse_hidden", ".~lock.", ".ipynb_checkpoints")  # of what is open elsewhere
FILES = ("table.md", "table.csv", "table.json", comparison_files.FIGURE)


def default_directory(groups: Sequence[Group]) -> Path:
    """Where a comparison is written by default: compare/LABELS beside the first run; with the name
    of the evaluation, if all have the same."""
    labels = [re.sub(r"[^a-z0-9.]+", "-", group.label.lower()).strip("-.") for group in groups]
    names = {member.name for group in groups for member in group.members}
    words = "-".join(["-vs-".join(labels), *(names if len(names) == 1 else ())]).strip("-.")
    if len(words) > MAX_NAME:
        digest = hashlib.sha256(words.encode()).hexdigest()[:8]
        words = f"{words[: MAX_NAME - 9].strip('-.')}-{digest}"
    first = Path(os.path.abspath(groups[0].first.run))
    return first.parent / "compare" / (words or "comparison")


def write(compared: Comparison, out: Path, command: str, with_figure: bool) -> bool:
    """Writes the files of a comparison into `out`, all or none, replacing an earlier comparison.
    Returns whether the figure is among them; it is left out, with one line, if it cannot be drawn.

    Raises UserError if `out` has other files; those that systems and programs leave do not count.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a directory; choose another --out")
    left = (f".{out.name}.", *LEFT)  # the first: of a comparison that was killed
    found = set(os.listdir(out)) if out.is_dir() else set()
    others = [n for n in found - set(FILES) if not is_system_name(n) and not n.startswith(left)]
    if others:
        raise UserError(
            f"{out} holds other files than a comparison's, such as {in_a_line(min(others))}; choose"
            " another --out"
        )
    drawn = False
    with atomic_directory(out) as partial:
        if with_figure:
            with optional(str(out / comparison_files.FIGURE)):
                comparison_plot.draw(compared, partial / comparison_files.FIGURE)
                drawn = True
        write_text(partial / "table.md", comparison_files.to_markdown(compared, command, drawn))
        write_text(partial / "table.csv", comparison.to_csv(compared.groups))
        write_text(partial / "table.json", comparison_files.to_json(compared))
    return drawn


def parser() -> flags.Parser:
    """The flags of a comparison."""
    parser = flags.build_parser(PROG, "python -m early_exit.compare RUN [RUN ...] [flags]", __doc__)
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
        "--points",
        type=Path,
        metavar="FILE",
        help="YAML file of points of the literature, as benchmarks/literature.yaml",
    )
    parser.add_argument(
        "--statics",
        type=Path,
        metavar="FILE",
        help="YAML file of networks without exits to compare with, as benchmarks/statics.yaml",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="batch size of the seconds (default: for each runtime the smallest that all"
        " evaluations in it were timed at)",
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


def is_comparison(path: Path) -> bool:
    """Whether this program wrote a directory: a comparison, or the directory of several."""
    if not path.is_dir() or evaluations(path, "report.json"):
        return False
    inside = [child for child in path.iterdir() if not is_hidden(child.name)]
    several = bool(inside) and all((child / "table.json").is_file() for child in inside)
    return several or (path / "table.json").is_file()


@contextmanager
def _skipping(alone: bool) -> Iterator[None]:
    """Prints an error in the context, unless nothing else is compared: then it raises it."""
    try:
        yield
    except (UserError, OSError) as error:
        if alone:
            raise
        print(f"{PROG}: skipping: {in_a_line(error)}", file=sys.stderr)


def read_evaluations(runs: Sequence[Path], names: Sequence[str]) -> list[Evaluation]:
    """The evaluations of the command line, each once.

    names: the evaluations of run directories to use; default: all. Of several runs, one without an
    evaluation and evaluations that cannot be read are named on standard error and skipped. Raises
    UserError if a path does not exist, if nothing remains, if the data sets differ, or if no run
    has an evaluation of a name.
    """
    found: dict[Path, Evaluation] = {}
    for run in runs:
        alone = len(runs) == 1 or not os.path.lexists(run)
        with _skipping(alone):
            if is_comparison(run):
                if len(runs) == 1:
                    raise UserError(f"{run} is a comparison; name the runs to compare")
                continue
            for path in find_reports(run, names):
                with _skipping(alone):
                    found.setdefault(path.resolve(), read_evaluation(path))
    unknown = set(names) - {evaluation.name for evaluation in found.values()}
    if unknown:
        raise UserError(f"no run has an evaluation {' or '.join(sorted(unknown))}; check --eval")
    if not found:
        raise UserError(f"none of the {len(runs)} paths has an evaluation; evaluate a run first")
    weights = {_weights_of(evaluation) for evaluation in found.values()}
    outdated = {each for each in weights if trained_since(*each)}
    marked = [
        replace(evaluation, outdated=_weights_of(evaluation) in outdated)
        for evaluation in found.values()
    ]
    runs_on: dict[str, dict[str, None]] = {}
    for evaluation in marked:
        runs_on.setdefault(evaluation.dataset, {})[str(evaluation.run)] = None
    if len(runs_on) > 1:
        named = "; ".join(f"{name}: {', '.join(on)}" for name, on in runs_on.items())
        raise UserError(
            "accuracy on different data sets cannot be compared; name only runs on one of them"
            f" ({named})"
        )
    return marked


def timed(groups: Sequence[Group], batch_size: int | None) -> list[Panel]:
    """The panels of seconds. Raises UserError if nothing was timed at the given batch size."""
    panels = panels_of(groups, batch_size)
    if batch_size is not None and not panels:
        sizes = sorted({size for group in groups for size in group.batch_sizes})
        known = f"only at {', '.join(map(str, sizes))}" if sizes else "at all"
        raise UserError(f"nothing was timed at --batch-size {batch_size}, {known}")
    return panels


def _weights_of(evaluation: Evaluation) -> tuple[Path, str, str | None]:
    """The arguments of `trained_since`, equal for evaluations of the same weights."""
    return evaluation.run, evaluation.weights, evaluation.rounded_to


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the evaluations, writes the comparison and prints the table."""
    args = parser().parse_args(argv)
    groups = labelled(group_runs(read_evaluations(args.runs, args.eval), args.each), args.labels)
    dataset = groups[0].first.dataset
    listed = listed_networks(args.statics, dataset) if args.statics else []
    compared = Comparison(
        groups,
        [*static_networks(groups), *listed],
        timed(groups, args.batch_size),
        read_points(args.points, dataset) if args.points else (),
    )
    out = Path(os.path.abspath(args.out)) if args.out else default_directory(groups)
    if not is_writable(out):
        raise UserError(f"{out} cannot be written; name another directory with --out")
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "early_exit.compare", *map(str, words)])
    drawn = write(compared, out, command, with_figure=not args.no_plots)
    for caution in comparison.cautions(groups):
        log.warning("%s", caution)
    parts = [
        comparison.table(groups),
        *comparison.notes(groups),
        *comparison_files.others(compared),
    ]
    print("\n\n".join(parts))
    print(f"\ntable:  {in_a_line(out / 'table.md')}, .csv and .json")
    if drawn:
        print(f"figure: {in_a_line(out / comparison_files.FIGURE)}")
