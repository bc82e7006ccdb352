"""Make a small copy of a trained run, to be given away: weights, policy, report and a card.

    python -m early_exit.export runs/mine models/mine
    python -m early_exit.predict models/mine photo.jpg

What only training needs stays behind. The card (README.md) says what the network was trained on,
how accurate it is, what it costs and under which licence it is given.
"""

import json
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from early_exit import checkpoint, cli, flags
from early_exit import config as configs
from early_exit.classifier import Classifier, evaluation_directory, load, read_report
from early_exit.disk import made_whole, write_text, written_whole
from early_exit.errors import UserError
from early_exit.trained import training_command
from early_exit.wording import provenance

PROG = "early_exit.export"
# Of a checkpoint: what is needed to build the network and to know what it was trained on.
KEPT = ("format", "position", "config", "exit_names", "classes", "normalisation", "val_hash",
        "unseen_val", "versions", "averaged")


def parser() -> flags.Parser:
    """The flags."""
    parser = flags.build_parser(PROG, "python -m early_exit.export RUN DIR [flags]", __doc__)
    flags.add_evaluated_run(parser)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the copy goes")
    parser.add_argument(
        "--licence", default="not stated", metavar="TEXT",
        help="under which licence the weights are given, for the card (default: not stated)",
    )
    parser.add_argument(
        "--source", default="", metavar="TEXT",
        help="where the training data come from and what is known of their licence, for the card",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the copy."""
    args = parser().parse_args(argv)
    if args.directory.exists():
        raise UserError(f"{args.directory} exists; name a new directory, or remove it")
    evaluation = evaluation_directory(args.run, args.eval)
    classifier = load(evaluation, device="cpu")
    run = evaluation.parent.parent
    _, state = checkpoint.newest(run)
    with made_whole(args.directory) as partial:
        with written_whole(partial / checkpoint.NAME) as file:
            torch.save(slim(state), file)
        copy = partial / "eval" / evaluation.name
        report = read_report(evaluation)
        report["command"] = without_directories(shlex.split(report["command"]))
        write_text(copy / "report.json", json.dumps(report) + "\n")
        classifier.policy.save(copy / "policy.yaml")
        try:
            words = card(report, classifier, trained_by(run), args.licence, args.source)
        except (KeyError, TypeError):
            raise UserError(
                f"{evaluation / 'report.json'} is of another version; evaluate the run again"
            ) from None
        write_text(partial / "README.md", words)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    print(f"exported: {args.directory}, {size / 1e6:.2f} MB")


def slim(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's weights that are reported, and what is needed to use them."""
    kept = {name: state[name] for name in KEPT if name in state}
    config = configs.without_paths(state["config"])
    return {**kept, "config": config, "network": checkpoint.reported(state)}


def trained_by(run: Path) -> str:
    """The command that trained the run, as far as that is known."""
    command = training_command(run)
    if not command:  # an exported run does not say
        return ""
    return f" How it was trained: `{without_directories(['python', *command])}`."


def without_directories(command: Sequence[str]) -> str:
    """A command whose absolute paths are names alone: the others are somebody's own."""
    return shlex.join(map(_without_directory, command))


def _without_directory(word: str) -> str:
    """A path, or the one behind a flag's or a setting's `=`."""
    flag, equals, path = ("", "", word) if word.startswith("/") else word.partition("=")
    return f"{flag}{equals}{Path(path).name}" if path.startswith("/") else word


def card(
    report: dict[str, Any], classifier: Classifier, trained: str, licence: str, source: str
) -> str:
    """What somebody must know who is given the network, in Markdown. trained: a sentence on how, or
    nothing."""
    cost, loaded = classifier.cost, classifier.loaded
    parameters = cost.backbone_params + sum(cost.head_params)
    rows = []
    for row in report["exits"]:
        macs = f"{100 * row['macs_share']:.1f} %" if row["on"] else "off"
        rows.append(
            f"| {row['name']} | {macs} | {100 * row['accuracy']:.2f} % | {100 * row['taken']:.1f} %"
            " |"
        )
    channels, height, width = loaded.network.image_shape
    plain = len(rows) == 1
    names = ", ".join(loaded.classes[:20]) + (", ..." if len(loaded.classes) > 20 else "")
    regime = "" if plain else f", regime {report['regime']}"
    chosen = "" if plain else f" Who leaves where: {report['chosen_by']}."
    fitted = provenance(
        plain=plain,
        cdl=report["cdl"] is not None,
        calibrated=report["calibrated"],
        policy_given=report.get("policy_given", False),
        **{
            name: report[name]
            for name in ("thresholds_given", "val_images", "val_from", "test_images")
        },
    )
    paragraphs = [
        f"# {report['arch']}{'' if plain else ' with early exits'}, {report['dataset']}",
        f"{len(loaded.classes)} classes ({names}); images of {width}x{height} pixels,"
        f" {'grey' if channels == 1 else 'RGB'}. {parameters:,} parameters. It knows nothing else:"
        " an image of something that is none of these gets one of these names too.",
        f"On test ({report['test_images']:,} images) {100 * report['test']['accuracy']:.2f} % are"
        f" right at {100 * report['test']['macs_share']:.1f} % of the plain network's"
        f" {cost.plain_macs / 1e6:.2f} M multiply-adds; the final exit alone is right for"
        f" {100 * report['final_accuracy']:.2f} %.",
        "\n".join(
            ["| exit | multiply-adds | alone, test | leave here |",
             "| --- | ---: | ---: | ---: |", *rows]
        ),
        f"Trained on {report['dataset']}{regime}; {report['weights']}.{trained}{chosen}"
        f" {fitted}" + (f" {source}" if source else ""),
        f"Licence of the weights: {licence}.",
        f"How it was evaluated: `{report['command']}`, with"
        f" {', '.join(f'{name} {value}' for name, value in report['versions'].items())}; all"
        " settings and numbers are in `eval/*/report.json`.",
        "Use it: `python -m early_exit.predict DIRECTORY photo.jpg`, or from Python:",
    ]
    code = (
        "    from early_exit.classifier import load\n"
        '    classify = load("DIRECTORY")\n'
        '    print(classify(["photo.jpg"]))'
    )
    wrapped = [
        part if part.startswith(("|", "#")) else textwrap.fill(
            part, 100, break_long_words=False, break_on_hyphens=False
        )
        for part in paragraphs
    ]
    return "\n\n".join([*wrapped, code]) + "\n"


if __name__ == "__main__":
    cli.run(main, PROG)
