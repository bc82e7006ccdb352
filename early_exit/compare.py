"""Compare evaluations: one table and one figure over several runs, seeds of a recipe as one row.

    python -m early_exit.compare runs/a runs/b                        every evaluation of two runs
    python -m early_exit.compare runs/a runs/b --eval budget-50-max_prob      one of each
    python -m early_exit.compare runs/a-0 runs/a-1 runs/a-2           seeds: mean ± deviation
    python -m early_exit.compare runs/a-0 runs/a-1 --each             the same, one by one
    python -m early_exit.compare runs/a/eval/risk1 runs/b --labels certified cheap

Runs whose settings are equal but for the seed, evaluated under the same name, are seeds of one
recipe. Test is only shown: whatever was chosen was chosen on val when the runs were evaluated.
"""

import csv
import dataclasses
import functools
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from early_exit import cli, flags, plots
from early_exit.disk import made_whole, write_text
from early_exit.errors import UserError
from early_exit.labels import differing, labelled
from early_exit.recipes import GRID, Recipe, Value, find, group, read

FILES = ("table.md", "table.csv", "table.json", "curves.png")
MOST_ALONE = 8  # early exits that get a column each on the page; the files have all
# Colour, dash and marker of a curve: numbers without a common factor, so 280 are told apart.
COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "os^vPXph"


@dataclass(frozen=True)
class Column:
    """Numbers of the table."""

    head: str
    """On the page."""
    name: str
    """In the CSV, with its unit."""
    scale: float
    decimals: int
    unit: str
    value: Callable[[Recipe], Value | None]

    def cell(self, recipe: Recipe) -> str:
        """As the page shows it: ± where there is a deviation."""
        value = self.value(recipe)
        if value is None:
            return "-"
        numbers = [value.mean] if value.std is None else [value.mean, value.std]
        shown = [f"{self.scale * number:.{self.decimals}f}" for number in numbers]
        return " ± ".join(shown) + self.unit

    def plain(self, recipe: Recipe) -> tuple[float | str, float | str]:
        """Mean and deviation as the CSV has them, empty where there is none."""
        value = self.value(recipe) or Value("")
        return tuple("" if number in ("", None) else self.scale * number
                     for number in (value.mean, value.std))


def columns(recipes: Sequence[Recipe]) -> list[Column]:
    """The numbers that are shown: exits alone if all that have any have as many."""
    exits = [tuple(recipe.first.alone) for recipe in recipes if not recipe.plain]
    names = exits[0] if len({len(each) for each in exits}) == 1 else ()
    heads = names if len(set(exits)) == 1 else [f"exit {at + 1}" for at in range(len(names))]
    batches = sorted({size for recipe in recipes for size in recipe.batch_sizes})
    decimals = 2 if min(recipe.first.plain_macs for recipe in recipes) > 1e7 else 3

    def alone(at: int, recipe: Recipe) -> Value | None:
        return recipe.over(lambda one: one.exit_alone(at))

    def speedup(size: int, recipe: Recipe) -> Value | None:
        return recipe.over(lambda one: one.speedups.get(size))

    return [
        *(Column(f"{head} alone", f"{head.replace(' ', '_')}_alone_percent", 100, 2, " %",
                 functools.partial(alone, at)) for at, head in enumerate(heads)),
        Column("final exit", "final_exit_percent", 100, 2, " %", Recipe.final),
        Column("chosen point", "chosen_point_percent", 100, 2, " %", Recipe.accuracy),
        Column("its MACs", "macs_percent_of_plain", 100, 1, " %", Recipe.share),
        Column("in millions", "macs_millions", 1e-6, decimals, "", Recipe.macs),
        *(Column(f"speed-up, batch {size}", f"speedup_batch_{size}_times", 1, 2, " x",
                 functools.partial(speedup, size)) for size in batches),
    ]


def table(recipes: Sequence[Recipe]) -> str:
    """The table, for the screen and for the page."""
    shown = columns(recipes)
    if sum(column.head.endswith(" alone") for column in shown) > MOST_ALONE:
        shown = [column for column in shown if not column.head.endswith(" alone")]
    heads = ["recipe", "seeds", "chosen by", *(column.head for column in shown)]
    lines = [heads, ["---", "---:", "---", *("---:" for _ in shown)]]
    for recipe in recipes:
        cuts = f" ({recipe.first.cuts} cuts)" if recipe.first.cuts else ""
        lines.append([
            recipe.name.replace("|", r"\|"), f"{len(recipe.members)}{cuts}", recipe.goal or "-",
            *(column.cell(recipe) for column in shown),
        ])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def notes(recipes: Sequence[Recipe]) -> list[str]:
    """What the numbers are worth, a sentence or two each."""
    cuts, seeds = ([recipe for recipe in recipes if holds(recipe)] for holds in (
        lambda recipe: recipe.first.cuts, lambda recipe: len(recipe.members) > 1))
    said = [
        f"Data set {recipes[0].first.dataset}. Test is only shown; what was chosen was chosen on"
        " val. MACs are multiply-adds an image at the chosen point, the heads that ran included, in"
        " percent of the recipe's own plain network's and in millions."
    ]
    if " alone |" in table(recipes):
        said[0] += " *Alone*: if every test image left there."
    if seeds:
        said.append("±: sample standard deviation over seeds"
                    + (", of means over cuts where there are cuts." if cuts else "."))
    if cuts:
        said.append(
            "Cuts: of the final exit, the chosen point and its MACs the mean over several cuts of"
            " the test set into val and test is shown"
            + ("." if len(seeds) == len(recipes) else ", for one seed ± their deviation.")
            + " Exits alone and the curve are those of the first cut."
        )
    if len(seeds) < len(recipes):
        said.append("Rows of one seed do not say what another seed would give.")
    splits = {recipe.first.split: {} for recipe in recipes}
    for recipe in recipes:
        splits[recipe.first.split][recipe.name] = None
    if len(splits) > 1:
        said.append("Test is not the same images everywhere. " + " ".join(
            f"Val {split}: {'; '.join(names)}." for split, names in splits.items()))
    devices = {one.device for recipe in recipes for one in recipe.members if one.speedups}
    if devices:
        where = " and ".join(sorted(devices))
        said.append(f"Speed-ups are over the plain network, timed on {where}.")
    unlike = [key for key in differing(recipes) if key != "run.seed"]
    if unlike:
        said.append(f"The runs differ in {', '.join(unlike)}.")
    return said


CAPTION = (
    "Curves are those of thresholds shared by all exits. Of several seeds: each seed's curve is"
    f" read by linear interpolation at the same {GRID} MACs, evenly over the range that all of them"
    " cover; line and band are mean ± standard deviation. Stars with bars: the chosen points."
    " Diamonds: the final exits."
)


def to_markdown(recipes: Sequence[Recipe], command: str, drawn: bool) -> str:
    """The page."""
    runs = "\n".join(
        f"- {recipe.label}: " + ", ".join(f"`{one.path.parent}`" for one in recipe.members)
        for recipe in recipes
    )
    picture = [f"![Test accuracy against multiply-adds]({FILES[3]})", CAPTION] if drawn else []
    return "\n\n".join([
        "# " + " / ".join(recipe.label for recipe in recipes), table(recipes), *notes(recipes),
        *picture, "## How this was made", f"{runs}\n- command: `{command}`",
    ]) + "\n"


def to_csv(recipes: Sequence[Recipe]) -> str:
    """One row a recipe; means and deviations in columns of their own."""
    shown, text = columns(recipes), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{column.name}_{end}" for column in shown for end in ("mean", "std")]
    writer.writerow(["recipe", "chosen_by", "evaluation", "seeds", "cuts", *ends])
    for recipe in recipes:
        numbers = [number for column in shown for number in column.plain(recipe)]
        first = recipe.first
        writer.writerow([recipe.name, recipe.goal, first.name, len(recipe.members), first.cuts,
                         *numbers])
    return text.getvalue()


def to_json(recipes: Sequence[Recipe]) -> str:
    """Everything: fractions, not percent; `std` is null where there is one seed and no cuts."""
    rows = []
    for recipe in recipes:
        macs, mean, std = recipe.curve()
        values = {
            "accuracy": recipe.accuracy(), "final_accuracy": recipe.final(),
            "macs_share": recipe.share(), "macs": recipe.macs(),
            "alone": {name: recipe.over(lambda one, at=at: one.exit_alone(at))
                      for at, name in enumerate(recipe.first.alone)},
            "speedup": {size: recipe.over(lambda one, size=size: one.speedups.get(size))
                        for size in recipe.batch_sizes},
        }
        rows.append({
            "recipe": recipe.name, "label": recipe.label, "chosen_by": recipe.goal,
            "evaluations": [
                {"run": str(one.run), "evaluation": one.name, "seed": one.seed}
                for one in recipe.members
            ],
            "seeds": len(recipe.members), "cuts": recipe.first.cuts,
            "val_from": recipe.first.split, "plain_macs": recipe.first.plain_macs, **values,
            "curve": {"macs": macs.tolist(), "mean": mean.tolist(),
                      "std": std.tolist() if len(recipe.members) > 1 else None},
            "settings": recipe.first.settings,
        })
    found = {"dataset": recipes[0].first.dataset, "recipes": rows, "notes": notes(recipes)}
    return json.dumps(found, indent=1, allow_nan=False, default=dataclasses.asdict) + "\n"


def draw(recipes: Sequence[Recipe], path: Path) -> None:
    """Test accuracy against multiply-adds: a curve a recipe, its chosen point, its final exit."""
    with plots.figure(path, (8, 5.2)) as (_, axes):
        for number, recipe in enumerate(recipes):
            colour = COLOURS[number % len(COLOURS)]
            at, accuracy = recipe.macs(), recipe.accuracy()
            bars = {
                "xerr": 1e-6 * (at.std or 0), "yerr": 100 * (accuracy.std or 0), "ecolor": colour,
                "capsize": 3, "zorder": 5, "mec": "black", "mfc": colour,
            }
            point = 1e-6 * at.mean, 100 * accuracy.mean
            marker = MARKERS[number % len(MARKERS)]
            if recipe.plain:
                axes.errorbar(*point, fmt=marker, ms=9, **bars)
                axes.annotate(recipe.label, point, textcoords="offset points", xytext=(4, 9),
                              ha="right", fontsize=9)
                continue
            macs, mean, std = recipe.curve()
            axes.plot(
                1e-6 * macs, 100 * mean, color=colour, ls=DASHES[number % len(DASHES)], lw=1.8,
                marker=marker, ms=7, mec="white", mew=0.6,
                label=re.sub("^_", " _", recipe.label),  # a legend leaves out names with _ first
                markevery=(0.02 + 0.14 * number / len(recipes), 0.14),
            )
            if std.any():
                axes.fill_between(1e-6 * macs, 100 * (mean - std), 100 * (mean + std), lw=0,
                                  color=colour, alpha=0.2)
            axes.errorbar(*point, fmt="*", ms=15, mew=0.7, **bars)
            final = macs[-1] if len(macs) else recipe.first.plain_macs
            axes.plot(1e-6 * final, 100 * recipe.final().mean, "D", ms=6, mfc=colour, mec="black",
                      mew=0.7, zorder=4)
        if not all(recipe.plain for recipe in recipes):
            for shape, words in (("*", "chosen point, ± as in the table"), ("D", "final exit")):
                axes.plot([], [], shape, color="white", mec="black", ms=11 if shape == "*" else 6,
                          label=words)
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, handlelength=4)
        axes.set_xlabel("multiply-adds an image, millions")
        axes.set_ylabel("accuracy on test, %")
        axes.set_title(recipes[0].first.dataset)


def directory_of(recipes: Sequence[Recipe]) -> Path:
    """Where a comparison goes that was given no place: compare/NAME beside the first run."""
    labels = [re.sub(r"[^a-z0-9.]+", "-", row.label.lower()).strip("-.") for row in recipes]
    words = "-vs-".join(labels)
    first = Path(os.path.abspath(recipes[0].first.run))
    return first.parent / "compare" / (words[:80].strip("-.") or "comparison")


def write(recipes: Sequence[Recipe], out: Path, command: str, drawn: bool) -> None:
    """Writes the files of a comparison into `out`, all or none, in place of an earlier one."""
    others = {path.name for path in out.iterdir()} - set(FILES) if out.is_dir() else set()
    if others or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} holds something else than a comparison; name another --out")
    with made_whole(out) as partial:
        write_text(partial / FILES[0], to_markdown(recipes, command, drawn))
        write_text(partial / FILES[1], to_csv(recipes))
        write_text(partial / FILES[2], to_json(recipes))
        if drawn:
            draw(recipes, partial / FILES[3])


def parser() -> flags.Parser:
    """The flags of a comparison."""
    parser = flags.build_parser(
        "early_exit.compare", "python -m early_exit.compare RUN [RUN ...] [flags]", __doc__
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN",
        help="a run directory, an evaluation in it (RUN/eval/NAME), or a report.json",
    )
    parser.add_argument(
        "--eval", action="append", default=[], metavar="NAME",
        help="of run directories: the evaluation of this name; repeatable (default: all there are)",
    )
    parser.add_argument(
        "--each", action="store_true", help="every run by itself: no means over seeds"
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="LABEL",
        help="what the rows are called, in their order (default: what sets them apart)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help=f"directory for {', '.join(FILES[:3])} and {FILES[3]}; an earlier comparison there is"
        " replaced (default: compare/LABELS beside the first run)",
    )
    parser.add_argument("--no-plots", action="store_true", help="no picture")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the evaluations, writes the comparison and prints the table."""
    args = parser().parse_args(argv)
    found = {path.resolve(): path for run in args.runs for path in find(run, args.eval)}
    evaluations = [read(path) for path in found.values()]
    first = evaluations[0]
    for other in evaluations:
        if other.dataset != first.dataset:
            raise UserError(
                f"{first.path} is on {first.dataset} and {other.path} on {other.dataset}; accuracy"
                " on different data sets cannot be compared"
            )
    unknown = set(args.eval) - {one.name for one in evaluations}
    if unknown:
        raise UserError(f"no run has an evaluation {' or '.join(sorted(unknown))}; check --eval")
    recipes = labelled(group(evaluations, args.each), args.labels)
    out = Path(os.path.abspath(args.out)) if args.out else directory_of(recipes)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "early_exit.compare", *map(str, words)])
    write(recipes, out, command, not args.no_plots)
    print("\n\n".join([table(recipes), *notes(recipes)]))
    print(f"\ntable:  {out / FILES[0]}, .csv and .json"
          + ("" if args.no_plots else f"\nfigure: {out / FILES[3]}"))


if __name__ == "__main__":
    cli.run(main, "early_exit.compare")
