"""Unreadable files: found by their headers before a long run, counted and named.

A header says the format and the size of an image. A file whose pixels are damaged or cut short has
a good header; it is found only when the image is decoded.
"""

import logging
from collections.abc import Iterable
from multiprocessing.pool import ThreadPool

import numpy as np

from early_exit.data.decoding import Unreadable
from early_exit.data.sources import CHUNK, THREADS, Files
from early_exit.data.workers import UnreadableFile
from early_exit.errors import UserError

log = logging.getLogger(__name__)

NAMED = 3  # files in a message


def leave_out(unreadable: Iterable[UnreadableFile], known: set[str], allowed: int) -> None:
    """Adds unreadable files to those that are `known`, and logs each once.

    Raises UserError if these are more than `allowed` then.
    """
    new = [file for file in unreadable if file.name not in known]
    known.update(file.name for file in new)
    if new and len(known) > allowed:
        examples = ", ".join(map(str, new[:NAMED]))
        count = f"{len(new)} files, such as " if len(new) > NAMED else ""
        raise UserError(
            f"{count}{examples} cannot be read as an image, and only {allowed} such files are"
            " skipped; replace them, or skip more of them with --bad-files"
            f" {max(10, 2 * allowed, len(known))}"
        )
    for file in new:
        log.warning("skipping %s", file)


def unreadable_headers(files: Files, rows: np.ndarray) -> list[UnreadableFile]:
    """The files in these rows whose header cannot be read, in order."""

    def check(chunk: np.ndarray) -> list[UnreadableFile]:
        return [found for row in chunk.tolist() if (found := _check(files, row))]

    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    # its threads are daemons: one that hangs on storage does not keep the program from ending
    with ThreadPool(THREADS) as pool:
        return [found for part in pool.imap(check, chunks) for found in part]


def _check(files: Files, row: int) -> UnreadableFile | None:
    """The file in this row if its header cannot be read, else None."""
    try:
        files.read_header(row)
    except Unreadable as error:
        return UnreadableFile(error.name, error.reason)
    return None
