"""The records of an evaluated run, and their cuts into images to choose on and images to report on.

Each script here that needs the records of trained runs reads them with this module.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from early_exit.choosing.record import ExitRecord
from early_exit.cli import flags
from early_exit.data.splits import halves

CUTS = 10  # over which means and deviations are taken


@dataclass(frozen=True)
class RunRecords:
    """The float32 records of one run."""

    val: ExitRecord | None
    """None if test is cut in two and one half serves as val."""
    test: ExitRecord

    @classmethod
    def load(cls, run: Path, val_from: str = "train") -> "RunRecords":
        """Reads the records that an evaluation stored in the run directory `run`.

        val_from: `train` or `test`, as for eval.py. Raises UserError if a record is missing.
        """
        val = None if val_from == "test" else ExitRecord.load(run / "records" / "val-off")
        return cls(val, ExitRecord.load(run / "records" / "test-off"))

    def cut(self, seed: int) -> tuple[ExitRecord, ExitRecord]:
        """The images to choose on and those to report on: half of val and all of test, or the two
        halves of test."""
        source = self.test if self.val is None else self.val
        first, second = halves(source.targets, seed)
        reported = self.test if self.val is not None else source.subset(second, "test", "")
        return source.subset(first, "val", ""), reported


def add_val_from(parser: argparse.ArgumentParser) -> None:
    """The flag that says which images are chosen on."""
    parser.add_argument(
        "--val-from",
        choices=("train", "test"),
        default="train",
        help="train: choose on halves of val; test: choose on one half of test and report on the"
        " other (default train)",
    )


def run_parser(script: str, docstring: str | None) -> flags.Parser:
    """The flags of a script that reads the records of one run."""
    parser = flags.build_parser(script, f"python docs-src/figures/{script} RUN [flags]", docstring)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory that was evaluated")
    add_val_from(parser)
    return parser
