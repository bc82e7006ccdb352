"""Classify images with a trained run or a deployed model, exits taken.

    python -m early_exit.predict runs/mine photo.jpg          a table
    python -m early_exit.predict runs/mine photos more.png    every image in a folder
    python -m early_exit.predict runs/mine photos --json      a line of JSON per image
    python -m early_exit.predict runs/mine - < names.txt      files named on standard input

The thresholds are those of an evaluation of the run (--eval). A deployed model, made by
`python -m early_exit.export --format onnx`, is used without torch, on the CPU. An image that cannot
be read is named on standard error and skipped; the exit code is then 2.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    from early_exit.cli.border import run

    run("early_exit.predict", "early_exit.predict", needs_torch=False)

import argparse
import dataclasses
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from early_exit.cli import flags
from early_exit.data.image_files import find_images
from early_exit.data.name_list import read_names
from early_exit.errors import Unavailable, UserError
from early_exit.loading import check_directory, load
from early_exit.manifest import is_deployed
from early_exit.prediction import ImageClassifier, Prediction
from early_exit.system.provenance import check_torchvision
from early_exit.system.text import in_a_line, path_text

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
        "-0",
        "--null",
        action="store_true",
        help="the names on standard input end with a NUL byte, as those of find -print0",
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
    group = flags.add_machine_flags(parser, "off")
    group.add_argument(
        "--runtime",
        metavar="NAME",
        help="what runs the network: of a deployed model onnxruntime, openvino or openvino-bf16,"
        " but of one in 8-bit integers only its own; of a run also torch, compile and others"
        " (default: that in which the policy was chosen)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Classifies the images and prints the answers."""
    args = parser().parse_args(argv)
    flags.check_at_least(args, 1, "batch_size")
    if args.null and "-" not in args.images:
        raise UserError("-0 has no effect without -, which reads the names from standard input")
    classifier = _load(args)
    table = None if args.json else Table(classifier)
    if table:
        print(table.heading())
    skipped: list[str] = []
    exits: Counter[int] = Counter()
    for path, found in predict(
        classifier, _names(args.images, args.null), args.batch_size, skipped
    ):
        exits[found.exit_index] += 1
        print(table.row(path, found) if table else as_json(path, found), flush=True)
    if exits and table:
        print(summary(exits, classifier))
    if not exits and not skipped:
        raise UserError("no image was named; name files or folders, or - for a list of names")
    if skipped:
        raise UserError(f"skipped {len(skipped)} of {len(skipped) + exits.total()} images")


def _load(args: argparse.Namespace) -> ImageClassifier:
    """The run or deployed model, and the machine as the flags say."""
    settings = flags.settings_of(args)
    if is_deployed(args.run):
        return _load_deployed(args, settings)
    check_directory(args.run)
    check_torchvision()
    from early_exit import classifier
    from early_exit.system.device import set_up  # imports torch, as the classifier does

    loaded = classifier.load(
        args.run, args.eval, task=args.task, overrides=settings, runtime=args.runtime
    )
    classifier.check_data_is_read(loaded, settings)
    set_up(loaded.loaded.config.run)
    return loaded


def _load_deployed(args: argparse.Namespace, settings: dict[str, Any]) -> ImageClassifier:
    """A deployed model. settings: those of the flags. Raises UserError for flags that are of a run
    only."""
    given = settings.get("run", {})
    words = {name: f"--{name.replace('_', '-')}" for name in given}
    words["channels_last"] = "--no-channels-last"
    ignored = [words[name] for name in given if name not in ("device", "threads")]
    ignored += [f"--{name}" for name in ("eval", "task") if getattr(args, name) is not None]
    ignored += ["--data"] if "data" in settings else []
    if ignored:
        raise UserError(
            f"remove {' and '.join(ignored)}: {args.run} is a deployed model, which has one policy"
            " and runs on the CPU in the precision of its runtime"
        )
    threads = given.get("threads")
    try:
        threads = None if threads is None else int(threads)
    except ValueError:
        raise UserError(f"--threads must be a number, got {threads!r}") from None
    device = given.get("device", "auto")
    return load(args.run, device=device, runtime=args.runtime, threads=threads)


def _names(given: Sequence[str], null: bool) -> Iterator[str]:
    """The names of the command line, with those on standard input in the place of -."""
    for name in given:
        if name != "-":
            yield name
        elif sys.stdin is None:
            raise UserError("standard input is closed; - reads the names of images from it")
        else:
            try:
                yield from read_names(cast(io.BufferedReader, sys.stdin.buffer), null)
            except OSError as error:
                raise Unavailable(
                    f"standard input cannot be read: {error.strerror or error}"
                ) from None


def _tell(line: str) -> None:
    """Prints a line about the images on standard error."""
    print(f"{PROG}: {in_a_line(line)}", file=sys.stderr)


def predict(
    classifier: ImageClassifier, names: Iterable[str], batch_size: int, skipped: list[str]
) -> Iterator[tuple[Path, Prediction]]:
    """Every readable image with its prediction; the others are named on standard error and added
    to `skipped`. What was read before an error that ends the names is classified."""
    batch: list[tuple[Path, np.ndarray]] = []

    def flush() -> Iterator[tuple[Path, Prediction]]:
        if batch:
            files, images = zip(*batch, strict=True)
            batch.clear()
            yield from zip(files, classifier.predict(images), strict=True)

    def skip(name: str | Path, error: Exception) -> None:
        _tell(f"skipping: {error}")
        skipped.append(str(name))

    def paths() -> Iterator[Path]:
        for name in names:
            try:
                for image in find_images([name], _tell):
                    if isinstance(image, UserError):
                        skip(name, image)
                    else:
                        yield image
            except (OSError, ValueError) as error:  # too long for a name, or a NUL in it
                reason = getattr(error, "strerror", None) or error
                skip(name, UserError(f"{name} cannot be read ({reason})"))

    found = paths()
    while True:
        try:
            path = next(found, None)
        except UserError:  # of standard input
            yield from flush()
            raise
        if path is None:
            break
        try:
            batch.append((path, classifier.read(path)))
        except UserError as error:
            skip(path, error)
        if len(batch) == batch_size:
            yield from flush()
    yield from flush()


@dataclass(frozen=True)
class Table:
    """The answers as a table on the screen."""

    classifier: ImageClassifier

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Of the columns of the classes and of the exits."""
        classes, exits = self.classifier.classes, self.classifier.policy.exit_names
        return (
            max(len(in_a_line(name)) for name in (*classes, "class")),
            max(len(name) for name in (*exits, "exit")),
        )

    def heading(self) -> str:
        """The first line."""
        width, exit_width = self.widths
        return f"{'class':{width}}    sure  {'exit':{exit_width}}  of the MACs  image"

    def row(self, path: Path, found: Prediction) -> str:
        """The line of an image."""
        width, exit_width = self.widths
        return (
            f"{in_a_line(found.name):{width}} {100 * found.confidence:5.1f} %"
            f"  {found.exit:{exit_width}}  {100 * found.macs_share:9.1f} %"
            f"  {in_a_line(path_text(path))}"
        )


def as_json(path: Path, prediction: Prediction) -> str:
    """One line of JSON."""
    values = dataclasses.asdict(prediction)
    return json.dumps({"image": path_text(path), "class": values.pop("name"), **values})


def summary(exits: Counter[int], classifier: ImageClassifier) -> str:
    """Where the images exited and what they cost, in one sentence. exits: the number of images at
    each exit."""
    policy, cost, count = classifier.policy, classifier.cost, exits.total()
    shares = cost.shares(policy.enabled)
    where = ", ".join(f"{exits[index]} at {policy.exit_names[index]}" for index in sorted(exits))
    mean = sum(shares[index] * number for index, number in exits.items()) / count
    return (
        f"{count} image{'s' if count > 1 else ''}: {where}; {100 * mean:.1f} % of the plain"
        f" network's {cost.plain_macs / 1e6:.2f} M multiply-adds on average"
    )
