"""Choose exit thresholds on val, run test with exits taken, and report accuracy and savings.

    python imagenet/eval.py RUN                       at most 0.5 points below the final exit
    python imagenet/eval.py RUN --budget 50           at most half of the plain network's MACs
    python imagenet/eval.py RUN --val-from test       for --pretrained, trained on all of train

The report is written to RUN/eval/NAME; thresholds are fitted on val and test is only reported.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("imagenet.eval", "eval.py")

from collections.abc import Sequence

from early_exit.cli import evaluation_flags, flags, program
from imagenet.main import TASK, add_reading_flags


def parser() -> flags.Parser:
    """The flags."""
    parser = evaluation_flags.evaluation_parser("imagenet/eval.py", "main.py", __doc__)
    add_reading_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, evaluates and prints the table."""
    program.evaluate(parser().parse_args(argv), TASK)
