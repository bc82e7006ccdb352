"""How the API pages read docstrings: names that a docstring explains become a list.

Our docstrings are prose in which `name: explanation` begins a line or follows a semicolon; Markdown
would join such lines. The fields of a dataclass are explained below each field; they are added to
the docstring of the class, because its signature already shows their types and defaults.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

# These sentences are about the whole call, so they end the list.
CLOSING = re.compile(r"(?<=\.) (?=(?:Returns|Raises|Equal) )")


class Lists(griffe.Extension):
    """Makes lists of explained parameters and fields in every docstring of a package."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called once, when all modules are loaded."""
        for item in all_objects(pkg):
            if item.docstring:
                item.docstring.value = with_lists(item.docstring.value, names_of(item))
            if item.is_class and item.docstring and "dataclass" in item.labels:
                item.docstring.value += "\n\n" + "\n".join(pop_field_items(item))


def all_objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    """A module, class or function and everything defined in it."""
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from all_objects(member)


def names_of(item: griffe.Object) -> set[str]:
    """The names that a docstring may explain: parameters, those of `__init__`, and fields."""
    if item.is_function:
        return {parameter.name for parameter in item.parameters}
    if item.is_class:
        init = item.members.get("__init__")
        fields = {name for name, member in item.members.items() if member.is_attribute}
        return fields | (names_of(init) if init and init.is_function else set())
    return set()


def pop_field_items(item: griffe.Class) -> Iterator[str]:
    """One list item per explained field of a dataclass; the field loses its own docstring."""
    for name, member in item.members.items():
        if member.is_attribute and "property" not in member.labels and member.docstring:
            yield f"- `{name}`: {' '.join(member.docstring.value.split())}"
            member.docstring = None


def with_lists(text: str, names: set[str]) -> str:
    """The docstring with every paragraph that explains `names` as a list."""
    return "\n\n".join(explained(part, names) for part in text.split("\n\n"))


def explained(paragraph: str, names: set[str]) -> str:
    """One list item per explained name if the paragraph begins with one; otherwise unchanged."""
    either = "|".join(map(re.escape, sorted(names)))
    if not names or not re.match(rf"(?:{either}): ", paragraph):
        return paragraph
    line = " ".join(paragraph.split())
    first, *after = CLOSING.split(line)
    items = re.split(rf" (?=(?:{either}): )", first)
    shown = [re.sub(rf"^({either}): ", r"- `\1`: ", item).rstrip(";") for item in items]
    return "\n".join(shown) + "".join(f"\n\n{sentence}" for sentence in after)
