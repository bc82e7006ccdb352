"""Make a small copy of a trained run that can be shared: weights, policy, report and a card.

    python -m early_exit.export runs/mine models/mine
    python -m early_exit.predict models/mine photo.jpg
    python -m early_exit.export runs/mine models/mine --format onnx    to be used without torch

The copy lacks what only training needs. With --format onnx it has one ONNX file per segment, which
were compared with the run, and predicts with ONNX Runtime or OpenVINO; in 8-bit integers only with
the one that the run was evaluated in, and images of train are needed to write it. The card
(README.md) states the training data, accuracy, cost and licence of the network.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    from early_exit.cli.border import run

    run("early_exit.export", "early_exit.export")

import json
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from early_exit import config as configs
from early_exit import export_onnx
from early_exit.classifier import Classifier, find_evaluation, load
from early_exit.cli import flags
from early_exit.errors import UserError
from early_exit.evaluation.markdown import cautions, provenance
from early_exit.evaluation.report import Choice
from early_exit.evaluation.upgrade import read_report
from early_exit.output import source_run
from early_exit.system.directories import atomic_directory
from early_exit.system.files import atomic_file, write_text
from early_exit.system.text import in_a_line
from early_exit.trained import training_command
from early_exit.training import checkpoint

PROG = "early_exit.export"
# The entries of a checkpoint that the copy has too, beside the weights.
COPIED = (
    "format",
    "position",
    "config",
    "exit_names",
    "classes",
    "normalisation",
    "val_hash",
    "unseen_val",
    "versions",
    "averaged",
)
USAGE = """\
    from early_exit import load
    classify = load("DIRECTORY")
    print(classify(["photo.jpg"]))"""


def parser() -> flags.Parser:
    """The flags."""
    parser = flags.build_parser(PROG, "python -m early_exit.export RUN DIR [flags]", __doc__)
    flags.add_evaluated_run(parser)
    parser.add_argument("directory", type=Path, metavar="DIR", help="new directory for the copy")
    parser.add_argument(
        "--licence",
        default="not stated",
        metavar="TEXT",
        help="licence of the weights, for the card (default: not stated)",
    )
    parser.add_argument(
        "--source",
        default="",
        metavar="TEXT",
        help="sentence about the source and the licence of the training data, for the card"
        " (default: none)",
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
    runtime = "torch"
    if args.format == "onnx":
        with _complete(path):
            runtime = export_onnx.reference_for(report)
    classifier = load(
        evaluation,
        task=args.task,
        device="cpu",
        overrides=flags.settings_of(args),
        runtime=runtime,
    )
    with atomic_directory(args.directory) as partial:
        with _complete(path):
            environment = report["environment"]
            environment["command"] = without_directories(shlex.split(environment["command"]))
        if args.format == "onnx":
            input_type = "float32" if args.input == "float" else "uint8"
            manifest = export_onnx.write(partial, classifier, report, input_type)
            notes = export_onnx.notes(manifest)
        else:
            notes = []
            write_run(partial, classifier, report, run, evaluation.name)
        with _complete(path):
            text = card(
                report, classifier, training_sentence(run), args.licence, args.source, notes
            )
        write_text(partial / "README.md", text)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    print(f"exported: {args.directory}, {size / 1e6:.2f} MB")


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
    with atomic_file(directory / checkpoint.NAME) as file:
        torch.save(slim(checkpoint.load(run)), file)
    copy = directory / "eval" / name
    classifier.policy.save(copy / "policy.yaml")
    write_text(copy / "report.json", json.dumps(report) + "\n")


def slim(state: dict[str, Any]) -> dict[str, Any]:
    """The reported weights of a checkpoint, and what is needed to use them."""
    copied = {name: state[name] for name in COPIED if name in state}
    config = configs.without_paths(state["config"])
    return {**copied, "config": config, "network": checkpoint.reported(state)}


def training_sentence(run: Path) -> str:
    """A sentence with the command that trained the run; empty if it is not known, as for a copy."""
    command = training_command(run)
    if not command:
        return ""
    return f"Training command: `{without_directories(['python', *command])}`."


def without_directories(command: Sequence[str]) -> str:
    """A command in which absolute paths are shortened to their last part, because the directories
    are private."""
    return shlex.join(map(_without_directory, command))


def _without_directory(word: str) -> str:
    """A word of a command with its absolute path shortened; the path may follow `flag=`."""
    flag, equals, path = ("", "", word) if word.startswith("/") else word.partition("=")
    return f"{flag}{equals}{Path(path).name}" if path.startswith("/") else word


def card(
    report: dict[str, Any],
    classifier: Classifier,
    training: str,
    licence: str,
    source: str,
    notes: Sequence[str] = (),
) -> str:
    """What users of the network must know, in Markdown.

    training, source: sentences on how it was trained and on its data; either may be empty. notes:
    paragraphs on the files of a deployed model; none: they are a run's.
    """
    numbers = "all settings and numbers are in `eval/*/report.json`"
    if notes:
        numbers = "the numbers are in `model.json` too"
    run, choice, environment = report["run"], report["choice"], report["environment"]
    plain = len(report["exits"]) == 1
    versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
    regime = "" if plain else f", regime {run['regime']}"
    sentences = [
        f"Trained on {run['dataset']}{regime}; {run['weights']}.",
        training,
        "" if plain else f"The policy was chosen for: {choice['goal']}.",
        provenance(Choice(**choice), plain=plain, cdl=report["cdl"] is not None),
        source,
    ]
    paragraphs = [
        f"# {run['arch']}{'' if plain else ' with early exits'}, {run['dataset']}",
        *cautions(run.get("unfinished"), choice.get("left_out", ())),
        _input_paragraph(classifier),
        _accuracy_paragraph(report, classifier.cost.plain_macs),
        exit_table(report),
        " ".join(filter(None, sentences)),
        f"Licence of the weights: {licence}.",
        f"Evaluated with `{environment['command']}`, {versions}; {numbers}.",
        *notes,
        "Use it: `python -m early_exit.predict DIRECTORY photo.jpg`, or from Python:",
        USAGE,
    ]
    return "\n\n".join(map(_wrapped, paragraphs)) + "\n"


def _input_paragraph(classifier: Classifier) -> str:
    """Classes, image size and parameters."""
    classes, cost = classifier.classes, classifier.cost
    channels, height, width = classifier.loaded.network.image_shape
    names = ", ".join(map(in_a_line, classes[:20])) + (", ..." if len(classes) > 20 else "")
    return (
        f"{len(classes)} classes ({names}); images of {width}x{height} pixels,"
        f" {'grey' if channels == 1 else 'RGB'}."
        f" {cost.backbone_params + sum(cost.head_params):,} parameters. An image of anything else"
        " is assigned to one of these classes too."
    )


def _accuracy_paragraph(report: dict[str, Any], plain_macs: int) -> str:
    """Accuracy and cost of the policy on test."""
    test = report["test"]
    return (
        f"Accuracy on test ({report['choice']['test_images']:,} images):"
        f" {100 * test['accuracy']:.2f} % at {100 * test['macs_share']:.1f} % of the plain"
        f" network's {plain_macs / 1e6:.2f} M multiply-adds; with no exit taken"
        f" {100 * report['final_accuracy']:.2f} %."
    )


def exit_table(report: dict[str, Any]) -> str:
    """Cost and accuracy of each exit, in Markdown."""
    lines = [
        "| exit | multiply-adds | accuracy of this exit | images that exit here |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in report["exits"]:
        macs = f"{100 * row['macs_share']:.1f} %" if row["enabled"] else "disabled"
        lines.append(
            f"| {row['name']} | {macs} | {100 * row['accuracy']:.2f} %"
            f" | {100 * row['exited']:.1f} % |"
        )
    return "\n".join(lines)


def _wrapped(paragraph: str) -> str:
    """A paragraph in lines of at most 100 characters; a heading, table or code stays as it is."""
    if paragraph.startswith(("#", "|", "    ")):
        return paragraph
    return textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False)
