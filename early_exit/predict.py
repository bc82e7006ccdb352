"""Classify images with a trained run, exits taken.

    python -m early_exit.predict runs/mine photo.jpg          a table
    python -m early_exit.predict runs/mine photos more.png    every image in a folder
    python -m early_exit.predict runs/mine photos --json      a line of JSON per image
    python -m early_exit.predict runs/mine - < names.txt      files named on standard input

The thresholds are those of an evaluation of the run (--eval). An image that cannot be read is named
and skipped; the exit code is then 2.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    from early_exit.cli.border import run

    run("early_exit.predict", "early_exit.predict")

import dataclasses
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from early_exit.classifier import Classifier, Prediction, load
from early_exit.cli import flags, settings
from early_exit.data.image_files import find_images
from early_exit.errors import UserError
from early_exit.system.device import set_up

PROG = "early_exit.predict"


def parser() -> flags.Parser:
    """The flags."""
    parser = flags.build_parser(PROG, "python -m early_exit.predict RUN IMAGE ... [flags]", __doc__)
    flags.add_evaluated_run(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders of them, or - for names on standard input, one per line",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a line of JSON per image instead of a table"
    )
    parser.add_argument(
        "-b",
        "--batch-size",
        type=int,
        default=64,
        metavar="B",
        help="images per forward pass (default 64)",
    )
    flags.add_machine_flags(parser, "off")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Classifies the images and prints the answers."""
    args = parser().parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    classifier = load(args.run, args.eval, task=args.task, overrides=settings.settings_of(args))
    set_up(classifier.loaded.config.run)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be any bytes
    width = max(len(name) for name in (*classifier.classes, "class"))
    exit_width = max(len(name) for name in (*classifier.policy.exit_names, "exit"))
    if not args.json:
        print(f"{'class':{width}}    sure  {'exit':{exit_width}}  of the MACs  image")
    skipped: list[Path] = []
    predictions = []
    for name, found in predict(classifier, _names(args.images), args.batch_size, skipped):
        predictions.append(found)
        print(
            as_json(name, found)
            if args.json
            else f"{found.name:{width}} {100 * found.confidence:5.1f} %"
            f"  {found.exit:{exit_width}}  {100 * found.macs_share:9.1f} %  {in_a_line(name)}"
        )
    if predictions and not args.json:
        print(summary(predictions, classifier))
    if skipped:
        raise UserError(f"skipped {len(skipped)} of {len(skipped) + len(predictions)} images")


def _names(given: Sequence[str]) -> Iterator[Path]:
    for name in given:
        if name == "-":
            yield from find_images(line for line in map(str.strip, sys.stdin) if line)
        else:
            yield from find_images([name])


def predict(
    classifier: Classifier, names: Iterator[Path], batch_size: int, skipped: list[Path]
) -> Iterator[tuple[Path, Prediction]]:
    """Every readable image with its prediction; the others are named on standard error and added
    to `skipped`."""
    batch: list[tuple[Path, np.ndarray]] = []

    def flush() -> Iterator[tuple[Path, Prediction]]:
        if batch:
            files, images = zip(*batch, strict=True)
            batch.clear()
            yield from zip(files, classifier.predict(images), strict=True)

    for name in names:
        try:
            batch.append((name, classifier.read(name)))
        except UserError as error:
            print(f"{PROG}: skipping: {in_a_line(error)}", file=sys.stderr)
            skipped.append(name)
        if len(batch) == batch_size:
            yield from flush()
    yield from flush()


def as_json(name: Path, prediction: Prediction) -> str:
    """One line of JSON."""
    values = dataclasses.asdict(prediction)
    return json.dumps({"image": str(name), "class": values.pop("name"), **values})


def in_a_line(value: object) -> str:
    """A value as text in one line, with what cannot be printed escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(value)
    )


def summary(predictions: Sequence[Prediction], classifier: Classifier) -> str:
    """Where the images exited and what they cost, in one sentence."""
    counts = Counter(prediction.exit for prediction in predictions)
    exits = ", ".join(
        f"{counts[name]} at {name}" for name in classifier.policy.exit_names if counts[name]
    )
    mean = sum(prediction.macs_share for prediction in predictions) / len(predictions)
    plain = classifier.cost.plain_macs / 1e6
    return (
        f"{len(predictions)} image{'s' if len(predictions) > 1 else ''}: {exits};"
        f" {100 * mean:.1f} % of the plain network's {plain:.2f} M multiply-adds on average"
    )
