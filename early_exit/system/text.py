"""Names and messages as text in one line, whatever is in them."""

import os
import unicodedata
from pathlib import Path

JOINERS = "\u200c\u200d"  # part of words in some scripts, and of emoji


def in_a_line(value: object) -> str:
    """A value as text, with what cannot be printed (a line break, a change of direction, bytes that
    are not UTF-8) escaped."""
    return "".join(
        letter
        if letter.isprintable() or letter in JOINERS or unicodedata.category(letter) == "Zs"
        else letter.encode("unicode_escape").decode()
        for letter in str(value)
    )


def shortened(value: object, length: int) -> str:
    """A value in a line of at most `length` characters."""
    line = in_a_line(value)
    return line if len(line) <= length else f"{line[: length - 3]}..."


def path_text(path: Path) -> str:
    """A path as text that is read as UTF-8 in every locale."""
    return os.fsencode(path).decode(errors="surrogateescape")
