"""Class folders: DIR/train/CLASS, of which val is a part, and DIR/val/CLASS, which are test."""

import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import islice, permutations
from pathlib import Path

import numpy as np

from early_exit.data.image_files import Found, describe, folder_identity, walk
from early_exit.data.sources import Files, Source, Sources
from early_exit.errors import DataError, Unavailable, UserError
from early_exit.system.disk_errors import status
from early_exit.system.names import is_hidden
from early_exit.system.text import in_a_line

log = logging.getLogger(__name__)

TRAIN = "train"
TEST = ("val", "test", "validation", "valid")  # the first of these that there is
ALSO = {"train": ("train", "training"), "val": (*TEST, "testing", "eval")}  # in any case
ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".rar", ".7z")
HINT_DEPTH, HINT_FOLDERS = 3, 1000  # how far data sets are looked for below a wrong directory


class LooseImages(UserError):
    """A folder with images and without class folders."""

    def __init__(self, folder: Path, images: Sequence[bytes]) -> None:
        self.folder, self.example = folder, os.fsdecode(images[0])
        super().__init__(
            f"{in_a_line(folder)} holds {len(images)} images, such as {in_a_line(self.example)},"
            f" and no class folders; sort them into {in_a_line(folder)}/CLASS/"
        )


def class_folders(root: Path) -> Sources:
    """The images of root/train, of which val is a part, and of root/val, which are test.

    Where there is no root/val, root/test is taken, root/validation or root/valid. Raises UserError
    for a missing directory, a folder that cannot be read, less than two classes, a class folder
    without images, classes that differ between train and val, and a folder that is in both.
    """
    shown = in_a_line(root)
    if not is_folder(root):
        broken = " (it is a link that leads nowhere)" if root.is_symlink() else ""
        raise DataError(
            f"there is no directory {shown}{broken}; expected images in {shown}/{TRAIN}/CLASS and"
            f" {shown}/{TEST[0]}/CLASS"
        )
    if not is_folder(root / TRAIN):
        raise _missing(root, TRAIN)
    name = _test_folder(root)
    train, test = walk(root / TRAIN, by_class=True), walk(root / name, by_class=True)
    classes, test_classes = _classes(train), _classes(test)
    _check_same_classes(root, name, classes, test_classes)
    _check_apart(train, test)
    _log_copies(train)
    if len(classes) == 1:
        raise _one_class(train, classes[0])
    files = _files(train, classes)
    sources: dict[str, Source] = {"train": files, "val": files, "test": _files(test, classes)}
    # not os.fsdecode: the classes of a run must not depend on the locale
    return tuple(name.decode(errors="surrogateescape") for name in classes), sources


def is_folder(path: Path) -> bool:
    """Whether there is a folder at `path`. Raises UserError if it cannot be examined."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def _test_folder(root: Path) -> str:
    """The name of the folder with the test images. Another name than `val` is logged."""
    there = [name for name in TEST if is_folder(root / name)]
    if not there:
        raise _missing(root, TEST[0])
    name, shown = there[0], in_a_line(root)
    if name != TEST[0]:
        log.info(
            "there is no %s/%s; the test images are those of %s/%s", shown, TEST[0], shown, name
        )
    for other in there[1:]:
        log.info("the test images are those of %s/%s; %s/%s is not used", shown, name, shown, other)
    return name


def _missing(root: Path, name: str) -> DataError:
    """The error for a directory that lacks train or val, with a hint at what to do."""
    shown = in_a_line(root)
    text = f"there is no {shown}/{name}; expected {shown}/{name}/CLASS/*.JPEG, a folder per class"
    if (root / name).is_symlink():
        text += f"; {shown}/{name} is a link that leads nowhere"
    elif os.path.lexists(root / name):
        text += f"; {shown}/{name} is not a folder"
    instead = [in_a_line(path) for path in islice(_data_sets_near(root), 3)]
    if instead:
        return DataError(f"{text}; did you mean {' or '.join(instead)}?")
    folders = _subfolders(root)
    for path in folders:
        if path.name.casefold() in ALSO[name] and path.name not in (TRAIN, *TEST):
            return DataError(f"{text}; if {in_a_line(path)} is meant, rename it to {name}")
    try:
        if any(entry.lower().endswith(ARCHIVES) for entry in os.listdir(root)):
            text += "; extract the archives first"
    except OSError as error:
        return DataError(f"{text}; {shown} cannot be listed ({error.strerror})")
    names = [in_a_line(path.name) for path in folders]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    holds = f"the folders {', '.join(names[:3])}{more}" if names else "no folder"
    return DataError(f"{text}; {shown} holds {holds}")


def _data_sets_near(root: Path) -> Iterator[Path]:
    """The folders a little above and below a directory that have train and val, or test."""
    yield from filter(_is_data_set, Path(os.path.abspath(root)).parents[:2])
    level = [root]
    for _ in range(HINT_DEPTH):
        level = [below for folder in level for below in _subfolders(folder)][:HINT_FOLDERS]
        yield from filter(_is_data_set, level)


def _is_data_set(folder: Path) -> bool:
    return os.path.isdir(folder / TRAIN) and any(os.path.isdir(folder / name) for name in TEST)


def _subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, in order; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not is_hidden(entry.name) if entry.is_dir()]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def _classes(found: Found) -> list[bytes]:
    """The class folders that a walk found, in order; the rest of what it found is logged.

    Raises UserError for what cannot be read, for images without class folders, and for a class
    folder without images.
    """
    shown = in_a_line(found.root)
    if found.unreadable:
        first, *unreadable = found.unreadable
        more = f", nor can {len(unreadable)} others" if unreadable else ""
        passes = isinstance(first, Unavailable)
        advice = "" if passes else "; make it readable for this user, or remove it"
        raise type(first)(f"{first}{more}{advice}")
    left_out = describe(sum(found.left_out.values(), Counter()))
    if left_out:
        log.info("%s: left out %s", shown, left_out)
    loose = found.images[b""]
    classes = sorted(found.images.keys() - {b""})
    if loose and not classes:
        raise LooseImages(found.root, loose)
    if loose:
        log.info(
            "%s: left out images beside the class folders (%d), such as %s",
            shown,
            len(loose),
            in_a_line(os.fsdecode(loose[0])),
        )
    if not classes:
        left = sum(found.left_out.values(), Counter())
        hint = "; extract the archives, each into a folder" if left.keys() & {*ARCHIVES} else ""
        raise UserError(
            f"{shown} has no class folders{_besides(left)}; expected {shown}/CLASS/*.JPEG{hint}"
        )
    empty = [name for name in classes if not found.images[name]]
    if empty:
        besides = _besides(found.left_out.get(empty[0], Counter()))
        others = f", nor in {len(empty) - 1} other class folders" if len(empty) > 1 else ""
        raise UserError(
            f"no image in {shown}/{in_a_line(os.fsdecode(empty[0]))}{besides}{others}; add images,"
            " or remove the class from train and val"
        )
    return classes


def _besides(left_out: Counter[str]) -> str:
    """What was left out, in brackets; empty if that is nothing."""
    return f" (left out: {describe(left_out)})" if left_out else ""


def _check_same_classes(
    root: Path, test_name: str, train: Sequence[bytes], test: Sequence[bytes]
) -> None:
    """Raises UserError if train and test differ in their classes."""
    shown = in_a_line(root)
    for (name, classes), (other, other_classes) in permutations(
        ((TRAIN, train), (test_name, test))
    ):
        missing = sorted(set(classes) - set(other_classes))
        if missing:
            spellings = {_spelling(class_name) for class_name in other_classes}
            hint = " (it has one spelled nearly so)" if _spelling(missing[0]) in spellings else ""
            raise UserError(
                f"{shown}/{name} has the class {in_a_line(os.fsdecode(missing[0]))}, which"
                f" {shown}/{other} lacks{hint}; both must have the same classes"
            )


def _spelling(name: bytes) -> str:
    """What two names have in common that differ in case, in the blanks around them, or in how they
    store accents, as macOS and Linux do."""
    return unicodedata.normalize("NFC", os.fsdecode(name)).casefold().strip()


def _check_apart(train: Found, test: Found) -> None:
    """Raises UserError if links make a folder or a file a part of train and of test."""
    for path, other in sorted(_shared_folders(train, test)):
        raise UserError(
            f"{in_a_line(path)} and {in_a_line(other)} are the same folder, so test images would be"
            " trained on; use other images in one of them"
        )
    shared = [*_shared_files(train, test)]
    if shared:
        raise UserError(
            f"{len(shared)} links, such as {in_a_line(shared[0])}, lead to files that are in train"
            " and in test, so test images would be trained on; remove these links"
        )


def _log_copies(train: Found) -> None:
    """Logs if images of train are in several classes by links: val may have a copy of what the
    weights are trained on."""
    listed = set().union(*train.images.values()) if train.links else set()
    links = [path for path in train.links if path in listed]  # the others are in their class twice
    counts = Counter(train.links[path] for path in links)
    root, is_listed = os.fsencode(train.root), cache(partial(_is_listed, train))
    copies = [
        path
        for path in links
        if counts[train.links[path]] > 1 or is_listed(_folder_of_target(os.path.join(root, path)))
    ]
    if copies:
        log.info(
            "%d links, such as %s, lead to images that are in another class too; one copy may be"
            " trained on and the other be in val: remove these links, or do not rely on val",
            len(copies),
            in_a_line(os.fsdecode(copies[0])),
        )


def _folder_of_target(link: bytes) -> bytes:
    """The folder of the file that a link leads to, in the end if it leads to other links."""
    while os.path.islink(link):
        link = os.path.join(os.path.dirname(link), os.readlink(link))
    return os.path.dirname(link)


def _shared_folders(train: Found, test: Found) -> Iterator[tuple[Path, Path]]:
    """The two paths of each folder that is in train and in test."""
    for identity in train.folders.keys() & test.folders.keys():
        one, other = train.folders[identity], test.folders[identity]
        if one is not None and other is not None:  # else it is above both
            paths = train.root / os.fsdecode(one), test.root / os.fsdecode(other)
            # the numbers of folders are not unique on every network file system
            if os.path.realpath(paths[0]) == os.path.realpath(paths[1]):
                yield paths


def _shared_files(train: Found, test: Found) -> Iterator[Path]:
    """The links in one of both to a file that is listed, or linked, in the other."""
    in_both = set(train.links.values()) & set(test.links.values())
    for found, other in permutations((train, test)):
        is_listed = cache(partial(_is_listed, other))
        for path, identity in found.links.items():
            link = os.path.join(os.fsencode(found.root), path)
            if identity in in_both or is_listed(_folder_of_target(link)):
                yield Path(os.fsdecode(link))


def _is_listed(found: Found, folder: bytes) -> bool:
    """Whether a walk listed a folder in a class."""
    try:
        return bool(found.folders.get(folder_identity(folder)))
    except OSError:
        return False


def _one_class(found: Found, name: bytes) -> UserError:
    """The error for a data set of one class, with a hint at what to do."""
    folder = in_a_line(found.root / os.fsdecode(name))
    below = {path.split(b"/")[1] for path in found.folders.values() if path and b"/" in path}
    inner = sorted(in_a_line(os.fsdecode(part)) for part in below)
    hint = f"; if its folders {', '.join(inner[:3])} are the classes, move them up" if inner else ""
    return UserError(f"{folder} is the only class; expected at least two{hint}")


def _files(found: Found, classes: Sequence[bytes]) -> Files:
    """The images of the classes, in order."""
    counts = [len(found.images[name]) for name in classes]
    names = np.array([path for name in classes for path in found.images[name]])
    return Files(found.root, names, np.repeat(np.arange(len(classes)), counts))
