"""The names of the files that a run was made of, so that a later change can be reported by name.

`files.npz` in a run directory has the names in train, val and test at the start of the training;
beside a record, those that were recorded, with the size and the time of each file. Runs of images
in memory have none.
"""

import io
import logging
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from early_exit.data.base import Data, FileData
from early_exit.errors import DataError
from early_exit.system.files import write_bytes
from early_exit.system.text import first_few, in_a_line

log = logging.getLogger(__name__)

NAME = "files.npz"
STAMPS = "stamps"  # sizes and times, as `FileData.file_stamps` gives them


def remember(
    directory: Path,
    data: Data,
    splits: Iterable[str] = ("train", "val", "test"),
    stamps: np.ndarray | None = None,
) -> None:
    """Writes the names of the files of these splits into the directory, whole or not at all.

    stamps: sizes and times of the files of the one split.
    """
    if not isinstance(data, FileData):
        return
    names = {split: data.file_names(split) for split in splits}
    arrays: dict[str, Any] = {split: found for split, found in names.items() if found is not None}
    if stamps is not None:
        arrays[STAMPS] = stamps
    if arrays:
        content = io.BytesIO()
        np.savez_compressed(content, **arrays, val_hash=np.array(data.val_hash))
        write_bytes(directory / NAME, content.getvalue())


def remembered(directory: Path, split: str, val_hash: str | None = None) -> np.ndarray | None:
    """The names of the files of a split; None if the directory has none.

    val_hash: of the run, if the names must be of its own val.
    """
    try:
        with np.load(directory / NAME) as arrays:
            if val_hash in (None, str(arrays["val_hash"])):
                return arrays[split]
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    return None


def changes(before: np.ndarray, now: np.ndarray) -> str:
    """How many files are gone and how many are new, with names; empty if none."""
    found = []
    for words, names in (("gone", np.setdiff1d(before, now)), ("new", np.setdiff1d(now, before))):
        if len(names):
            found.append(f"{_are(names)} {words} ({first_few(names)})")
    return " and ".join(found)


def with_val_of(
    data: Data, path: Path, val_hash: str, alternative: str = ""
) -> tuple[Data, tuple[str, ...]]:
    """The data with the val images that a run held out, even if files of train were added or
    removed since, and the names of those that are gone.

    path: the run's directory or checkpoint; alternative: what else the user can do, for messages.
    Raises DataError if the run has no list of its files, and if more of val are gone than
    `data.bad_files`.
    """
    if data.val_hash == val_hash:
        return data, ()
    directory = path if path.is_dir() else path.parent
    train, val = (remembered(directory, split, val_hash) for split in ("train", "val"))
    if train is None or val is None or not isinstance(data, FileData):
        advice = ""
        if isinstance(data, FileData):
            advice = (
                "; bring back the files of train as they were (for one that was unreadable, an"
                " empty file of its name and --bad-files will do)"
            )
        raise DataError(
            f"{path} held out other val images ({val_hash}) than this data set gives"
            f" ({data.val_hash}), and has no list of its files ({NAME}){advice}{alternative}"
        )
    present = [data.file_names(split) for split in ("train", "val")]
    now = np.concatenate([names for names in present if names is not None] or [val[:0]])
    changed = changes(np.concatenate([train, val]), now) or "only the order has changed"
    gone = np.setdiff1d(val, now)
    if len(gone) > data.bad_files or len(gone) == len(val):
        advice = "put them back"
        if 2 * len(gone) <= len(val):
            advice += f", or leave them out with --bad-files {max(10, len(gone))}"
        raise DataError(
            f"of the {len(val)} val images that {path} held out, {_are(gone)} gone"
            f" ({first_few(gone)}); of all files of train since then, {changed};"
            f" {advice}{alternative}"
        )
    log.info(
        "since the training of %s, the files of train have changed: %s; val is the %d images that"
        " it held out%s",
        path,
        changed,
        len(val),
        f", of which {_are(gone)} gone" if len(gone) else "",
    )
    return data.holding_out(val, val_hash), tuple(f"train/{in_a_line(name)}" for name in gone)


def check_same_classes(data: Data, path: Path, classes: Sequence[str]) -> None:
    """Raises DataError if the data have other classes than the run at `path`."""
    if list(map(str, classes)) != list(map(str, data.classes)):
        raise DataError(
            f"{path} was trained on {len(classes)} classes ({first_few(classes)}), the data has"
            f" {len(data.classes)} ({first_few(data.classes)})"
        )


def log_changed_test(data: Data, run_dir: Path) -> None:
    """Logs which files of test have changed since the training."""
    before, now = remembered(run_dir, "test"), None
    if before is not None and isinstance(data, FileData):
        now = data.file_names("test")
    if before is not None and now is not None and (changed := changes(before, now)):
        log.warning("the files of test have changed since the training: %s", changed)


def _are(names: np.ndarray) -> str:
    """`1 is` or `2 are`."""
    return f"{len(names)} {'is' if len(names) == 1 else 'are'}"
