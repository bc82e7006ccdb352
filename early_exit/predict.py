"""Classify images with a trained run, exits taken.

    python -m early_exit.predict runs/mine photo.jpg          a table
    python -m early_exit.predict runs/mine photos more.png    every image in a folder
    python -m early_exit.predict runs/mine photos --json      a line of JSON for each image
    python -m early_exit.predict runs/mine - < names.txt      files named by standard input

The thresholds are those of an evaluation of the run (--eval). An image that cannot be read is named
and skipped; the exit code is then 2.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from early_exit import cli, flags
from early_exit.classifier import Classifier, Prediction, as_json, images_in, load
from early_exit.errors import UserError
from early_exit.experiment import setup

PROG = "early_exit.predict"


def parser() -> flags.Parser:
    """The flags."""
    parser = flags.build_parser(
        PROG, "python -m early_exit.predict RUN IMAGE ... [flags]", __doc__
    )
    flags.add_evaluated_run(parser)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE",
        help="image files, folders of them, or - for names on standard input, one a line",
    )
    parser.add_argument(
        "--json", action="store_true", help="a line of JSON for each image instead of a table"
    )
    parser.add_argument(
        "-b", "--batch-size", type=int, default=64, metavar="B",
        help="images that go through the network at a time (default 64)",
    )
    flags.add_machine_flags(parser, "off")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Classifies the images and prints what was answered."""
    args = parser().parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    classifier = load(args.run, args.eval, overrides=cli.settings_of(args))
    setup(classifier.loaded.config)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    width = max(len(name) for name in (*classifier.classes, "class"))
    place = max(len(name) for name in (*classifier.policy.exit_names, "exit"))
    if not args.json:
        print(f"{'class':{width}}    sure  {'exit':{place}}  of the MACs  image")
    names, skipped, answered = _names(args.images), [], []
    for name, found in predicted(classifier, names, args.batch_size, skipped):
        answered.append(found)
        print(
            as_json(name, found) if args.json else
            f"{found.name:{width}} {100 * found.confidence:5.1f} %  {found.exit:{place}}"
            f"  {100 * found.macs_share:9.1f} %  {in_a_line(name)}"
        )
    if answered and not args.json:
        print(summary(answered, classifier))
    if skipped:
        raise UserError(f"{len(skipped)} of {len(skipped) + len(answered)} images were skipped")


def _names(given: Sequence[str]) -> Iterator[Path]:
    for name in given:
        if name == "-":
            yield from images_in(line for line in map(str.strip, sys.stdin) if line)
        else:
            yield from images_in([name])


def predicted(
    classifier: Classifier, names: Iterator[Path], batch_size: int, skipped: list[Path]
) -> Iterator[tuple[Path, Prediction]]:
    """Every image that can be read, with its prediction; the others are named on standard error and
    put into `skipped`."""
    batch: list[tuple[Path, torch.Tensor]] = []

    def answered() -> Iterator[tuple[Path, Prediction]]:
        if batch:
            files, images = zip(*batch, strict=True)
            batch.clear()
            yield from zip(files, classifier.predictions(torch.stack(images)), strict=True)

    for name in names:
        try:
            batch.append((name, classifier.read(name)))
        except UserError as error:
            print(f"{PROG}: skipping: {in_a_line(error)}", file=sys.stderr)
            skipped.append(name)
        if len(batch) == batch_size:
            yield from answered()
    yield from answered()


def in_a_line(what: object) -> str:
    """As text without line ends and other characters that cannot be seen."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(what)
    )


def summary(found: Sequence[Prediction], classifier: Classifier) -> str:
    """What all of them cost, in one sentence."""
    counts = Counter(prediction.exit for prediction in found)
    where = ", ".join(
        f"{counts[name]} at {name}" for name in classifier.policy.exit_names if counts[name]
    )
    mean = sum(prediction.macs_share for prediction in found) / len(found)
    plain = classifier.cost.plain_macs / 1e6
    return (
        f"{len(found)} image{'s' if len(found) > 1 else ''} answered: {where};"
        f" {100 * mean:.1f} % of the plain network's {plain:.2f} M multiply-adds on average"
    )


if __name__ == "__main__":
    cli.run(main, PROG)
