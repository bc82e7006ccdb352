"""Choose exit thresholds on val, run test with exits taken, and report what was saved.

    python cifar10/eval.py RUN                       at most 0.5 points below the final exit
    python cifar10/eval.py RUN --budget 50           within half of the plain network's MACs
    python cifar10/eval.py RUN --criterion entropy --thresholds -0.3
    python cifar10/eval.py RUN --delta 0.9           Conditional Deep Learning's choice of stages
    python cifar10/eval.py RUN --val-from test       for backbones that have seen all of train
"""

from collections.abc import Sequence

from cifar10.trainer import DOOR
from early_exit import cli, flags


def parser() -> flags.Parser:
    """The evaluation's flags."""
    return flags.evaluation_parser("cifar10", "trainer.py", __doc__)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, evaluates and prints the table."""
    cli.evaluate(parser().parse_args(argv), DOOR)


if __name__ == "__main__":
    cli.run(main, "eval.py")
