"""Choose exit thresholds on val, run test with exits taken, and report accuracy and savings.

    python cifar10/eval.py RUN                       at most 0.5 points below the final exit
    python cifar10/eval.py RUN --budget 50           at most half of the plain network's MACs
    python cifar10/eval.py RUN --criterion entropy --thresholds -0.3
    python cifar10/eval.py RUN --delta 0.9           Conditional Deep Learning's choice of stages
    python cifar10/eval.py RUN --val-from test       for backbones trained on all of train

The report is written to RUN/eval/NAME; thresholds are fitted on val and test is only reported.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("cifar10.eval", "eval.py")

from collections.abc import Sequence

from cifar10.trainer import TASK
from early_exit.cli import evaluation_flags, flags, program


def parser() -> flags.Parser:
    """The flags."""
    return evaluation_flags.evaluation_parser("cifar10/eval.py", "trainer.py", __doc__)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, evaluates and prints the table."""
    program.evaluate(parser().parse_args(argv), TASK)
