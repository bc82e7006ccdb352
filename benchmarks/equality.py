"""Counts where inference with exits taken differs from the record, by runtime and batch size.

    python benchmarks/equality.py runs/mine/eval/max-drop-0.5-max_prob --runtime torch onnxruntime
    python benchmarks/equality.py runs/mine/eval/max-drop-0.5-max_prob --batch-sizes 1 7 256

All images of the official test set are answered, under the policy of an evaluation, and compared
with the record that the same runtime makes of them. An answer or an exit may differ where a score
is within rounding of its threshold, or two classes within rounding of a tie; these are counted, and
so are any others, of which there should be none. If half of these images chose the policy, no
accuracy is printed.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("equality", "equality.py")

from collections.abc import Sequence

from early_exit.classifier import find_evaluation, task_of, val_from_of
from early_exit.cli import flags
from early_exit.errors import Failed
from early_exit.evaluation.live import run_live
from early_exit.evaluation.runtimes import check_settings
from early_exit.evaluation.upgrade import read_report
from early_exit.inference.policy import Policy
from early_exit.trained import get_record, load_run, recorded

HEADING = """\
| runtime | precision | batch size | images | accuracy | differ within rounding | differ beyond it \
| rounding |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


def parser() -> flags.Parser:
    """The script's flags."""
    parser = flags.build_parser("equality.py", "python benchmarks/equality.py RUN [flags]", __doc__)
    flags.add_evaluated_run(parser)
    parser.add_argument(
        "--runtime",
        nargs="+",
        default=["torch"],
        metavar="NAME",
        help="runtimes, as eval.py takes them (default: torch)",
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=int,
        default=[1, 7, 256],
        metavar="N",
        help="images per call (default: 1 7 256)",
    )
    flags.add_machine_flags(parser, "off")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Compares and prints a table. Raises Failed if anything differs beyond rounding."""
    args = parser().parse_args(argv)
    flags.check_at_least(args, 1, "batch_sizes")
    settings = flags.settings_of(args)
    check_settings(args.runtime, settings)
    evaluation = find_evaluation(args.run, args.eval)
    policy = Policy.load(evaluation / "policy.yaml")
    report = read_report(evaluation / "report.json")
    task = task_of(report.get("run", {}).get("task"), evaluation, args.task)
    print(HEADING)
    beyond, unseen = 0, val_from_of(report) == "train"
    for name in dict.fromkeys(args.runtime):
        trained = load_run(
            evaluation.parent.parent,
            task,
            settings,
            val_from_of(report),
            name,
            report.get("run", {}).get("rounded_to"),
        )
        test = get_record(trained, "test")
        data = recorded(trained.data, test)
        for batch_size in dict.fromkeys(args.batch_sizes):
            live = run_live(trained, data, test, policy, batch_size)
            beyond += live.differing_beyond_rounding
            cells = [
                name,
                trained.runtime.runtime.precision,
                str(batch_size),
                str(live.images),
                f"{100 * live.accuracy:.2f} %" if unseen else "-",
                str(live.differing - live.differing_beyond_rounding),
                str(live.differing_beyond_rounding),
                f"{live.rounding:.1e}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    if beyond:
        raise Failed(f"{beyond} answers or exits differ from the record beyond rounding")
