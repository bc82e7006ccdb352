"""Choose exit thresholds on val, run test with exits taken, and report what was saved.

    python imagenet/eval.py RUN                       at most 0.5 points below the final exit
    python imagenet/eval.py RUN --budget 50           within half of the plain network's MACs
    python imagenet/eval.py RUN --val-from test       for --pretrained: it has seen all of train
"""

from collections.abc import Sequence

from early_exit import cli, flags
from imagenet.main import DOOR, add_workers_flag


def parser() -> flags.Parser:
    """The evaluation's flags."""
    parser = flags.evaluation_parser("imagenet", "main.py", __doc__)
    add_workers_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, evaluates and prints the table."""
    cli.evaluate(parser().parse_args(argv), DOOR)


if __name__ == "__main__":
    cli.run(main, "eval.py")
