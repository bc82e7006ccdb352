"""Lists of file names as people have them: from find, from a spreadsheet, from another system."""

import codecs
import io
import os
from collections.abc import Iterator

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_names(stream: io.BufferedReader, null: bool = False) -> Iterator[str]:
    """The names of a list, one by one as they arrive; empty lines are skipped.

    A name is any bytes, as `os.fsdecode` gives them; spaces belong to it. null: names end with a
    NUL byte instead of a line break, as `find -print0` writes them. A byte order mark is skipped,
    and a list in UTF-16 that has one is decoded. `\\r` before the line break belongs to the name
    only if there is a file of that name.
    """
    for name in _decoded(stream, b"\0" if null else b"\n"):
        if not null and name.endswith("\r") and not _exists(name):
            name = name[:-1]
        if name:
            yield name


def _decoded(stream: io.BufferedReader, end: bytes) -> Iterator[str]:
    start = stream.peek(4)[:4]
    if start[:2] in UTF_16:
        # as nothing writes it bit by bit, it is read whole
        text = stream.read().decode("utf-16", "replace").encode()
        yield from map(os.fsdecode, text.split(end))
        return
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    for name in _split(stream, end):
        yield os.fsdecode(name)


def _split(stream: io.BufferedReader, end: bytes) -> Iterator[bytes]:
    """The parts of a stream, each as soon as it is complete."""
    if end == b"\n":
        yield from (line.removesuffix(end) for line in stream)
        return
    rest = b""
    while chunk := stream.read1(1 << 16):
        *parts, rest = (rest + chunk).split(end)
        yield from parts
    yield rest


def _exists(name: str) -> bool:
    try:
        return os.path.lexists(name)
    except ValueError:  # a NUL
        return False
