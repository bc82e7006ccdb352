"""What the rows of a comparison are called: by what sets them apart, in few words."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from early_exit.errors import UserError
from early_exit.recipes import Recipe

# What a row is told apart by, the first that does; any other setting comes after these.
TELLING = ("model.arch", "model.exits", "run.regime", "model.head", "loss.weights", "optim.epochs")
USUAL = "max_prob"  # the criterion that is not named
OF_EXITS = ("run.regime", "model.head", "loss.")  # settings that say nothing of a plain network


def labelled(recipes: Sequence[Recipe], labels: Sequence[str] | None = None) -> list[Recipe]:
    """The recipes with their names, goals and labels."""
    if labels and len(labels) != len(recipes):
        rows = "; ".join(recipe.label for recipe in labelled(recipes))
        raise UserError(f"--labels gives {len(labels)} for {len(recipes)} rows, which are: {rows}")
    labels = labels and [" ".join(label.split()) for label in labels]  # a line each
    names, goals = _names(recipes), _goals(recipes)
    several = len({goal for goal in goals if goal}) > 1
    whole = [f"{name}, {goal}" if several and goal else name
             for name, goal in zip(names, goals, strict=True)]
    return [
        dataclasses.replace(recipe, name=name, goal=goal, label=label)
        for recipe, name, goal, label in zip(
            recipes, labels or names, goals, labels or whole, strict=True
        )
    ]


def _goals(recipes: Sequence[Recipe]) -> list[str]:
    """What was asked for, with criterion, absence of temperatures and precision where they differ;
    the evaluation's name where that is all that differs. Of a plain network nothing is asked."""
    chosen = [recipe.first for recipe in recipes if not recipe.plain]
    criteria, temperatures = ({one.goal[at] for one in chosen} for at in (1, 2))
    precisions = {one.precision for one in chosen}
    goals = []
    for recipe in recipes:
        goal, criterion, calibrated = recipe.first.goal
        goal += f", {criterion}" if len(criteria) > 1 and criterion != USUAL else ""
        goal += ", no temperatures" if len(temperatures) > 1 and not calibrated else ""
        goal += f", {recipe.first.precision}" if len(precisions) > 1 else ""
        goals.append("" if recipe.plain else goal)
    rows = [(recipe.first.run, goal) for recipe, goal in zip(recipes, goals, strict=True)]
    return [recipe.first.name if rows.count(row) > 1 else row[1]
            for row, recipe in zip(rows, recipes, strict=True)]


def _names(recipes: Sequence[Recipe]) -> list[str]:
    """What sets each recipe's run apart, in as few settings as do; a directory where none does."""
    runs = [recipe.first.run for recipe in recipes]
    words: list[tuple[str, ...]] = [()] * len(recipes)
    for key in differing(recipes):
        longer = [(*said, word) if (word := _word(recipe, key)) else said
                  for said, recipe in zip(words, recipes, strict=True)]
        if len(set(longer)) > len(set(words)):
            words = longer
    told = set(zip(words, runs, strict=True))
    names = [
        ", ".join(_shortest(word, words)) if word and sum(word == other for other, _ in told) == 1
        else _directory(recipe)
        for word, recipe in zip(words, recipes, strict=True)
    ]
    if len(set(names)) < len(set(runs)):  # directories of one name
        names = [str(recipe.first.run) for recipe in recipes]
    return names


def _shortest(mine: tuple[str, ...], all_words: Sequence[tuple[str, ...]]) -> list[str]:
    """The first word, and as few of the others as no other row has all of."""
    kept = list(mine)
    for word in mine[:0:-1]:
        fewer = [other for other in kept if other != word]
        if not any(set(fewer) <= set(others) for others in all_words if others != mine):
            kept = fewer
    return kept


def differing(recipes: Sequence[Recipe]) -> list[str]:
    """The settings in which the runs differ, the most telling first."""
    keys = dict.fromkeys((*TELLING, *(key for row in recipes for key in row.first.settings)))
    words = {key: {_word(recipe, key) for recipe in recipes} - {""} for key in keys}
    found = [key for key in keys if len(words[key]) > 1]
    seeds = all(len(recipe.members) == 1 for recipe in recipes)
    return [*found, "run.seed"] if seeds else found


def _word(recipe: Recipe, key: str) -> str:
    """A setting as part of a name; nothing where it does not bear on the recipe."""
    if key == "run.seed":
        return f"seed {recipe.first.seed}"
    if key not in recipe.first.settings or recipe.plain and key.startswith(OF_EXITS):
        return ""
    value = recipe.first.settings[key]
    text = " ".join(f"{part:g}" if isinstance(part, float) else str(part)
                    for part in (value if isinstance(value, list) else [value]))
    if key in ("model.arch", "run.regime"):
        return text
    if key == "model.exits":
        many = len(value) > 1
        return (f"{len(value)} exits" if len(text) > 24 else
                f"exit{'s' if many else ''} {text}" if value else "plain")
    if key == "model.head":
        return f"{text} heads"
    if key == "optim.epochs":
        return f"{text} epochs"
    name = key.partition(".")[2].replace("_", " ")
    return f"{name} {Path(text).name if key == 'model.backbone' else text}"


def _directory(recipe: Recipe) -> str:
    """The run's directory; of several seeds what their names begin with."""
    names = [Path(os.path.abspath(member.run)).name for member in recipe.members]
    if len(names) == 1:
        return names[0]
    return re.sub(r"[-_.]*(seed|s)?[-_.]*$", "", os.path.commonprefix(names)) or names[0]
