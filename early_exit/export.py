"""Make a small copy of a trained run that can be shared: weights, policy, report and a card.

    python -m early_exit.export runs/mine models/mine
    python -m early_exit.predict models/mine photo.jpg
    python -m early_exit.export runs/mine models/mine --format onnx    to be used without torch

The copy lacks what only training needs. Its files are those that model hubs take: the weights in
model.safetensors, in float16 if the evaluation rounded them (eval.py --weights float16), everything
else in config.json, and a card, README.md, that states the training data, accuracy, cost and
licence of the network. So the directory can be uploaded to a hub as it is. With --format onnx it
has one ONNX file per segment instead, which were compared with the run, and predicts with ONNX
Runtime or OpenVINO; in 8-bit integers only with the one that the run was evaluated in, and images
of train are needed to write it.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    from early_exit.cli.border import run

    run("early_exit.export", "early_exit.export")

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from early_exit import config as configs
from early_exit import export_onnx
from early_exit.card import card
from early_exit.classifier import Classifier, check_data_is_read, find_evaluation, load
from early_exit.cli import flags
from early_exit.errors import UserError
from early_exit.evaluation.upgrade import read_report
from early_exit.front_matter import NOT_STATED, front_matter
from early_exit.inference.policy import NEVER, Policy
from early_exit.output import source_run
from early_exit.system.directories import atomic_directory
from early_exit.system.files import write_text
from early_exit.trained import training_commands
from early_exit.training import checkpoint, exported

PROG = "early_exit.export"
# The entries of a checkpoint that the copy has too, beside the weights.
COPIED = (*exported.TYPES, *exported.OPTIONAL)


def parser() -> flags.Parser:
    """The flags."""
    parser = flags.build_parser(PROG, "python -m early_exit.export RUN DIR [flags]", __doc__)
    flags.add_evaluated_run(parser)
    parser.add_argument("directory", type=Path, metavar="DIR", help="new directory for the copy")
    parser.add_argument(
        "--licence",
        default=NOT_STATED,
        metavar="TEXT",
        help="licence of the weights, for the card; an identifier such as mit or cc-by-4.0 is one"
        f" that hubs know (default: {NOT_STATED})",
    )
    parser.add_argument(
        "--source",
        default="",
        metavar="TEXT",
        help="sentence about the source and the licence of the training data, for the card"
        " (default: none)",
    )
    parser.add_argument(
        "--data-id",
        metavar="ID",
        help="the data set's identifier on a model hub, for the card (default: its name in the"
        " report)",
    )
    parser.add_argument(
        "--format",
        choices=("torch", "onnx"),
        default="torch",
        help="torch: a run, which can be evaluated and changed; onnx: a deployed model, which"
        " predicts without torch (default: torch)",
    )
    parser.add_argument(
        "--input",
        choices=("uint8", "float"),
        help="what the first ONNX file takes: pixels, which it normalises, or normalised float32"
        " (default: uint8)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the copy."""
    args = parser().parse_args(argv)
    if args.directory.exists():
        raise UserError(f"{args.directory} exists; name a new directory, or remove it")
    if args.input and args.format != "onnx":
        raise UserError("--input is of ONNX files; add --format onnx, or remove it")
    evaluation = find_evaluation(args.run, args.eval)
    run = source_run(evaluation.parent.parent)
    path = evaluation / "report.json"
    report = read_report(path)
    settings, runtime = flags.settings_of(args), "torch"
    if args.format == "onnx":
        with _complete(path):
            runtime = export_onnx.reference_for(report)
    classifier = load(
        evaluation,
        task=args.task,
        device="cpu",
        overrides=settings,
        runtime=runtime,
    )
    check_data_is_read(classifier, settings)
    with _complete(path):
        check_reported(classifier.policy, report, evaluation)
    with atomic_directory(args.directory) as partial:
        with _complete(path):
            environment = report["environment"]
            environment["command"] = without_directories(shlex.split(environment["command"]))
        if args.format == "onnx":
            input_type = "float32" if args.input == "float" else "uint8"
            manifest = export_onnx.write(partial, classifier, report, input_type)
            notes = export_onnx.notes(manifest, bool(report.get("guarantee")))
        else:
            notes = []
            write_run(partial, classifier, report, run, evaluation.name)
        with _complete(path):
            text = front_matter(report, args.licence, args.data_id) + card(
                report, classifier, training_sentence(run), args.licence, args.source, notes
            )
        write_text(partial / "README.md", text)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    print(f"exported: {args.directory}, {size / 1e6:.2f} MB")


def check_reported(policy: Policy, report: dict[str, Any], evaluation: Path) -> None:
    """Raises UserError if the policy of an evaluation was changed after its report, whose numbers
    the copy would state; KeyError or TypeError for a report that does not say which it is of."""
    *early, final = report["exits"]
    reported = Policy(
        exit_names=policy.exit_names,
        criterion=report["choice"]["criterion"],
        thresholds=tuple(NEVER if row["threshold"] is None else row["threshold"] for row in early),
        temperatures=tuple(row["temperature"] for row in (*early, final)),
        enabled=tuple(row["enabled"] for row in early),
        guarantee=policy.guarantee,
    )
    if policy != reported:
        path = evaluation / "policy.yaml"
        raise UserError(
            f"{path} is not the policy of its report: it was changed later. Evaluate the run with"
            f" it (eval.py {source_run(evaluation.parent.parent)} --policy {path} --name NAME), and"
            " export that evaluation"
        )


@contextmanager
def _complete(path: Path) -> Iterator[None]:
    """Raises UserError if the report at `path` lacks what is read from it in the context."""
    try:
        yield
    except (KeyError, TypeError):
        raise UserError(f"{path} is of another version; evaluate the run again") from None


def write_run(
    directory: Path, classifier: Classifier, report: dict[str, Any], run: Path, name: str
) -> None:
    """Writes the weights, and the policy and report of the evaluation of this name."""
    exported.write(directory, slim(checkpoint.load(run), classifier.loaded.rounded_to))
    copy = directory / "eval" / name
    classifier.policy.save(copy / "policy.yaml")
    write_text(copy / "report.json", json.dumps(report) + "\n")


def slim(state: dict[str, Any], rounded_to: str | None = None) -> dict[str, Any]:
    """The reported weights of a checkpoint, and what is needed to use them. rounded_to: as for
    `checkpoint.reported`."""
    copied = {name: state[name] for name in COPIED if name in state}
    config = configs.without_paths(state["config"])
    network = checkpoint.reported(state, rounded_to)
    return {**copied, "config": config, "rounded_to": rounded_to, "network": network}


def training_sentence(run: Path) -> str:
    """Sentences with the commands that trained the run; empty if they are not known, as for a
    copy."""
    lines = [f"`{without_directories(['python', *words])}`" for words in training_commands(run)]
    if not lines:
        return ""
    resumed = f" Resumed with other flags: {', then '.join(lines[1:])}." if lines[1:] else ""
    return f"Training command: {lines[0]}.{resumed}"


def without_directories(command: Sequence[str]) -> str:
    """A command in which paths from the root or above the working directory are shortened to their
    last part, because the directories are private."""
    return shlex.join(map(_without_directory, command))


def _without_directory(word: str) -> str:
    """A word of a command with its path shortened; the path may follow `flag=`."""
    outside = ("/", "../")
    flag, equals, path = ("", "", word) if word.startswith(outside) else word.partition("=")
    return f"{flag}{equals}{Path(path).name}" if path.startswith(outside) else word
