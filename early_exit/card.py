"""The card of a shared network, in Markdown: what its users must know.

It begins with the fields that model hubs read (`early_exit.front_matter`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from early_exit.classifier import Classifier
from early_exit.evaluation.markdown import cautions, is_given, provenance
from early_exit.evaluation.report import Choice
from early_exit.evaluation.tables import escaped

USAGE = """\
    from early_exit import load
    classify = load("DIRECTORY")
    print(classify(["photo.jpg"]))"""


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
    run, environment, choice = report["run"], report["environment"], Choice(**report["choice"])
    plain = len(report["exits"]) == 1
    cdl = report["cdl"] is not None
    chosen = not plain and not is_given(choice, cdl=cdl)
    versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
    regime = "" if plain else f", regime {run['regime']}"
    sentences = [
        f"Trained on {run['dataset']}{regime}; {run['weights']}.",
        training,
        f"The policy was chosen for: {choice.goal}." if chosen else "",
        provenance(choice, plain=plain, cdl=cdl),
        source,
    ]
    paragraphs = [
        f"# {run['arch']}{'' if plain else ' with early exits'}, {run['dataset']}",
        *cautions(run.get("unfinished"), choice.left_out),
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
    names = ", ".join(map(escaped, classes[:20])) + (", ..." if len(classes) > 20 else "")
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
