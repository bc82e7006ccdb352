"""The files of a comparison: table.md and table.json."""

import dataclasses
import json
import operator
from typing import Any

from early_exit.evaluation import savings_text
from early_exit.evaluation.comparison import Comparison, notes, table
from early_exit.evaluation.groups import GRID, Group
from early_exit.evaluation.markdown import code
from early_exit.evaluation.panels import Panel
from early_exit.evaluation.savings import Saving, macs_savings, seconds_savings
from early_exit.system.text import in_a_line

FIGURE = "curves.png"
CAPTION = (
    "Curves are those of one threshold for all exits. Curves of several seeds are interpolated"
    f" linearly at the same {GRID} costs, evenly spaced over the range that all of them cover; line"
    " and band are mean ± standard deviation. Stars with bars: the chosen policies. Diamonds: the"
    " final exits. Thin lines: the same network in other evaluations, as with other exits enabled."
    " Other filled marks: static networks. Hollow marks: the literature, under other"
    " rules. Seconds of curves are expected from the segments' times; those of stars and static"
    " networks are measured."
)


def to_markdown(comparison: Comparison, command: str, with_figure: bool) -> str:
    """table.md."""
    groups = comparison.groups
    runs = [
        f"- {in_a_line(group.label)}: "
        + ", ".join(code(str(member.path.parent)) for member in group.members)
        for group in groups
    ]
    against = "Test accuracy against multiply-adds" + (" and seconds" if comparison.panels else "")
    parts = [
        "# " + " / ".join(in_a_line(group.label) for group in groups),
        table(groups),
        *notes(groups),
        *([f"![{against}]({FIGURE})", CAPTION] if with_figure else []),
        *others(comparison),
        "## How this was made",
        "\n".join([*runs, f"- command: {code(command)}"]),
    ]
    return "\n\n".join(parts) + "\n"


def others(comparison: Comparison) -> list[str]:
    """What follows the table of the runs: static networks and the literature, in paragraphs."""
    savings = savings_text.sections(comparison.groups, comparison.statics, comparison.panels)
    return [*savings, *savings_text.literature(comparison.points)]


def to_json(comparison: Comparison) -> str:
    """table.json: all numbers, as fractions; `std` is null with one seed and no cuts."""
    groups, statics = comparison.groups, comparison.statics
    values = {
        "dataset": groups[0].first.dataset,
        "groups": [_group_values(group) for group in groups],
        "savings": {
            "macs": [_saving_values(saving) for saving in macs_savings(groups, statics)],
            "seconds": [_panel_values(panel, comparison) for panel in comparison.panels],
        },
        "literature": list(comparison.points),
        "notes": notes(groups),
    }
    return json.dumps(values, indent=1, allow_nan=False, default=dataclasses.asdict) + "\n"


def _panel_values(panel: Panel, comparison: Comparison) -> dict[str, Any]:
    savings = seconds_savings(panel, comparison.statics)
    return {
        "runtime": panel.runtime,
        "precision": panel.precision,
        "batch_size": panel.batch_size,
        "unit": panel.unit,
        "machines": panel.machines,
        "caution": panel.caution,
        "measured": {group.label: panel.measured(group) for group in panel.groups},
        "savings": [_saving_values(saving) for saving in savings],
    }


def _saving_values(saving: Saving) -> dict[str, Any]:
    static, exits = saving.static, saving.exits
    return {
        "kind": static.kind,
        "static_network": static.name,
        "accuracy": static.accuracy,
        "cost": saving.cost,
        "source": static.source,
        "better": saving.better,
        "exits": None
        if exits is None
        else {
            "label": exits.group.label,
            "accuracy": exits.accuracy,
            "cost": exits.cost,
            "budget_on_val": exits.budget,
        },
        "saving": saving.saving,
    }


def _group_values(group: Group) -> dict[str, Any]:
    first, curve = group.first, group.curve()
    return {
        "group": group.name,
        "label": group.label,
        "goal": group.goal,
        "runtime": first.runtime,
        "precision": first.precision,
        "rounded_to": first.rounded_to,
        "evaluations": [
            {
                "run": str(member.run),
                "evaluation": member.name,
                "seed": member.seed,
                "unfinished": member.unfinished,
                "outdated": member.outdated,
                "left_out": member.left_out,
            }
            for member in group.members
        ],
        "seeds": len(group.members),
        "cuts": first.cuts,
        "val_from": first.val_from,
        "plain_macs": first.plain_macs,
        "accuracy": group.accuracy(),
        "final_accuracy": group.final_accuracy(),
        "macs_share": group.macs_share(),
        "macs": group.macs(),
        "exit_accuracy": {
            name: group.mean(operator.methodcaller("accuracy_of_exit", index))
            for index, name in enumerate(first.exit_accuracy)
        },
        "speedup": {size: group.speedup(size) for size in group.batch_sizes},
        "curve": {
            "macs": curve.costs.tolist(),
            "accuracy": curve.accuracy.tolist(),
            "std": curve.std.tolist() if len(group.members) > 1 else None,
        },
        "settings": first.settings,
    }
