"""How the API pages read docstrings: what a docstring explains name by name becomes a list.

Ours are prose, in which `name: what it is` opens a line or follows a semicolon. Markdown would run
such lines together. And the fields of a dataclass are explained below each; they join the class's
docstring, since its signature already shows their types and defaults.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

CLOSING = re.compile(r"(?<=\.) (?=(?:Returns|Raises|Equal) )")  # said of the call, not of a name


class Lists(griffe.Extension):
    """Makes lists of explained parameters and fields, in every docstring of a package."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called once with all modules loaded."""
        for thing in walk(pkg):
            if thing.docstring:
                thing.docstring.value = listed(thing.docstring.value, names_of(thing))
            if thing.is_class and thing.docstring and "dataclass" in thing.labels:
                thing.docstring.value += "\n\n" + "\n".join(gathered(thing))


def walk(thing: griffe.Object) -> Iterator[griffe.Object]:
    """A module, class or function and all that is defined in it."""
    yield thing
    for member in thing.members.values():
        if not member.is_alias:
            yield from walk(member)


def names_of(thing: griffe.Object) -> set[str]:
    """What a docstring may explain: parameters, those of `__init__`, and fields."""
    if thing.is_function:
        return {parameter.name for parameter in thing.parameters}
    if thing.is_class:
        made = thing.members.get("__init__")
        fields = {name for name, member in thing.members.items() if member.is_attribute}
        return fields | (names_of(made) if made and made.is_function else set())
    return set()


def gathered(thing: griffe.Class) -> Iterator[str]:
    """An item for each explained field of a dataclass, which is then no member of its own."""
    for name, member in thing.members.items():
        if member.is_attribute and "property" not in member.labels and member.docstring:
            yield f"- `{name}`: {' '.join(member.docstring.value.split())}"
            member.docstring = None


def listed(text: str, names: set[str]) -> str:
    """The docstring with every paragraph that explains `names` as a list."""
    return "\n\n".join(explained(part, names) for part in text.split("\n\n"))


def explained(paragraph: str, names: set[str]) -> str:
    """A paragraph as it is, or, where it opens with an explained name, one item for each."""
    either = "|".join(map(re.escape, sorted(names)))
    if not names or not re.match(rf"(?:{either}): ", paragraph):
        return paragraph
    line = " ".join(paragraph.split())
    first, *after = CLOSING.split(line)
    items = re.split(rf" (?=(?:{either}): )", first)
    shown = [re.sub(rf"^({either}): ", r"- `\1`: ", item).rstrip(";") for item in items]
    return "\n".join(shown) + "".join(f"\n\n{sentence}" for sentence in after)
