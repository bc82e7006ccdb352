"""Names and messages as text in one line, whatever is in them."""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

JOINERS = "\u200c\u200d"  # part of words in some scripts, and of emoji


def in_a_line(value: object) -> str:
    """A value as text, with what cannot be printed escaped: line breaks, changes of direction, and
    bytes in a file's name that are not UTF-8."""
    text = value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)
    return "".join(map(_printable, text))


def _printable(letter: str) -> str:
    if letter.isprintable() or letter in JOINERS or unicodedata.category(letter) == "Zs":
        return letter
    if "\udc80" <= letter <= "\udcff":  # as Python reads such a byte
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def first_few(values: Iterable[object], count: int = 3) -> str:
    """`a, b, c and 4 more`: the first values, each in a line."""
    words = [in_a_line(value) for value in values]
    more = f" and {len(words) - count} more" if len(words) > count else ""
    return ", ".join(words[:count]) + more


def shortened(value: object, length: int) -> str:
    """A value in a line of at most `length` characters."""
    line = in_a_line(value)
    return line if len(line) <= length else f"{line[: length - 3]}..."


def path_text(path: Path) -> str:
    """A path as text that is read as UTF-8 in every locale."""
    return os.fsencode(path).decode(errors="surrogateescape")
