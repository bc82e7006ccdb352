"""Image files in folders: the same ones for training and for predict."""

import contextlib
import errno
import heapq
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from early_exit.errors import UserError
from early_exit.system.disk_errors import read_error
from early_exit.system.names import is_hidden
from early_exit.system.text import in_a_line

# Formats of photographs and pictures that Pillow decodes by itself. The list is fixed, because the
# files of a data set must not depend on the version of Pillow. Not among them: documents and
# drawings (.pdf, .eps, .psd), videos (.mpg), icons (.ico), containers of numbers (.h5, .fits), of
# which Pillow registers some without decoding them, and what needs a plug-in (.heic).
SUFFIXES = frozenset(
    suffix.encode()
    for suffix in (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
        *(".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".avif", ".qoi"),
        *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    )
)
# kinds of what is left out, beside the other suffixes
HIDDEN = "hidden or system names"
BROKEN = "broken links"
AGAIN = "links to what is listed already"
SPECIAL = "pipes, sockets and devices"
NO_SUFFIX = "without a suffix"
LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # of a link
SHOWN_KINDS = 6


Identity = tuple[int, int]
"""The device and the number of a folder: all its paths have them in common."""


@dataclass
class Found:
    """What a walk below a folder found. Paths are bytes, relative to the folder.

    A group is a folder directly below it, or b"", which are the files beside these folders; without
    `by_class` all files are in the group b"".
    """

    root: Path
    images: dict[bytes, list[bytes]] = field(default_factory=dict)
    """The image files of each group, in order."""
    left_out: dict[bytes, Counter[str]] = field(default_factory=dict)
    """How many of each kind were left out of each group."""
    unreadable: list[UserError] = field(default_factory=list)
    """Folders that could not be listed, and files that could not be examined."""
    folders: dict[Identity, bytes | None] = field(default_factory=dict)
    """The folders that were listed; None: a folder above them."""
    links: dict[bytes, int] = field(default_factory=dict)
    """The image files that are links, and what identifies their targets."""


def walk(root: Path, by_class: bool = False) -> Found:
    """The image files below a folder.

    Left out and counted are hidden and system names at any depth, files of other suffixes, broken
    links, and what is neither a folder nor a regular file. Links are followed. A folder is listed
    once, at its own place if it has one below the root, so a link to a folder above adds nothing.
    In a group an image file is listed once, under its own name if it has one there, however many
    links lead to it.

    The order is that of torchvision's `make_dataset`: by the path of the folder, then by name, both
    as bytes, so it depends on no locale and no file system.
    """
    return _Walk(root, by_class).run()


class _Walk:
    """A walk in progress."""

    def __init__(self, root: Path, by_class: bool) -> None:
        self.found, self.top, self.by_class = Found(root), os.fsencode(root), by_class
        self.files: dict[bytes, list[bytes]] = {}  # names, by folder
        # In order: whether a link leads there, and the folder. Those with a place of their own are
        # listed before the links, which may lead to them.
        self.waiting: list[tuple[bool, bytes]] = [(False, b"")]

    def run(self) -> Found:
        found = self.found
        real = Path(os.path.realpath(found.root))
        for above in real.parents:
            with contextlib.suppress(OSError):
                found.folders[folder_identity(above)] = None
        while self.waiting:
            by_link, folder = heapq.heappop(self.waiting)
            try:
                self._list(folder, by_link)
            except OSError as error:
                self._unreadable(folder, error)
        for folder in sorted(self.files):
            paths = [os.path.join(folder, name) for name in sorted(self.files.pop(folder))]
            found.images.setdefault(self._group(folder), []).extend(paths)
        for group in found.images if found.links else ():
            self._drop_twins(group)
        return found

    def _group(self, folder: bytes) -> bytes:
        return folder.partition(b"/")[0] if self.by_class else b""

    def _leave_out(self, folder: bytes, kind: str) -> None:
        self.found.left_out.setdefault(self._group(folder), Counter())[kind] += 1

    def _unreadable(self, path: bytes, error: OSError) -> None:
        shown = in_a_line(self.found.root / os.fsdecode(path))
        self.found.unreadable.append(read_error(shown, error))

    def _list(self, folder: bytes, by_link: bool) -> None:
        """Adds the files of a folder, and puts the folders in it on the list."""
        path = os.path.join(self.top, folder)
        # one call per folder and none per file: the listing tells which entries are files, except
        # for links and on file systems that do not store it
        identity = folder_identity(path)
        listed = self.found.folders
        if by_link and identity in listed:
            self._leave_out(folder, AGAIN)
            if not listed[identity]:  # the root or a folder above it: no class
                return
        self.found.images.setdefault(self._group(folder), [])
        if by_link and identity in listed:
            return
        listed[identity] = folder
        self.files[folder] = []
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    self._add(folder, by_link, entry)
                except OSError as error:
                    self._unreadable(os.path.join(folder, entry.name), error)

    def _add(self, folder: bytes, by_link: bool, entry: os.DirEntry[bytes]) -> None:
        """Adds one entry of a folder, or leaves it out."""
        name, path = entry.name, os.path.join(folder, entry.name)
        suffix = os.path.splitext(name)[1].lower()
        if is_hidden(name):
            if suffix in SUFFIXES or entry.is_dir(follow_symlinks=False):
                self._leave_out(folder, HIDDEN)
            return
        is_file, is_link = entry.is_file(follow_symlinks=False), entry.is_symlink()
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_link:
            try:
                status = entry.stat()
            except OSError as error:
                if error.errno not in LEADS_NOWHERE:
                    raise
                self._leave_out(folder, BROKEN)
                return
            is_file, is_folder = stat.S_ISREG(status.st_mode), stat.S_ISDIR(status.st_mode)
        if is_folder:
            heapq.heappush(self.waiting, (by_link or is_link, path))
        elif not is_file:
            self._leave_out(folder, SPECIAL)
        elif suffix not in SUFFIXES:
            self._leave_out(folder, in_a_line(os.fsdecode(suffix[:12])) or NO_SUFFIX)
        else:
            self.files[folder].append(name)
            if is_link:
                self.found.links[path] = _file_identity(status)

    def _drop_twins(self, group: bytes) -> None:
        """Leaves out links to files that are in the group already."""
        paths, links = self.found.images[group], self.found.links
        files = [path for path in paths if path not in links]
        if len(files) == len(paths):
            return
        seen: set[int | None] = set()
        for path in files:  # where links and files are mixed, each file costs a call
            with contextlib.suppress(OSError):
                seen.add(_file_identity(os.stat(os.path.join(self.top, path))))
        self.found.images[group] = kept = []
        for path in paths:
            if path in links and links[path] in seen:
                self._leave_out(os.path.dirname(path), AGAIN)
            else:
                kept.append(path)
                seen.add(links.get(path))


def folder_identity(path: Path | bytes) -> Identity:
    """What identifies a folder. Raises OSError."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _file_identity(status: os.stat_result) -> int:
    """A hash of more than the file's number, which is not unique on every network file system: two
    files that differ must never be taken for one."""
    return hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


def describe(left_out: Counter[str]) -> str:
    """What was left out, the most frequent kinds first; empty if that is nothing."""
    kinds = [f"{kind} ({count})" for kind, count in left_out.most_common()]
    if len(kinds) > SHOWN_KINDS + 1:
        kinds[SHOWN_KINDS:] = [f"{len(kinds) - SHOWN_KINDS} other kinds"]
    return ", ".join(kinds)


def find_images(
    names: Iterable[str | Path], log_line: Callable[[str], None]
) -> Iterator[Path | UserError]:
    """Yields each file as it is named; for a folder, the images that `walk` finds below it, in the
    order of their paths.

    Instead of an empty name, and of a folder that cannot be listed or holds no image, an error is
    yielded. log_line: called with a line about what was left out of a folder.
    """
    for name in names:
        if not str(name):  # otherwise the working directory
            yield UserError("an empty name is not an image; expected a file or a folder")
            continue
        path = Path(name)
        if not os.path.isdir(path):  # False for what cannot be looked at: reading it tells why
            yield path
            continue
        found = walk(path)
        images = sorted(found.images.get(b"", []), key=lambda image: image.split(b"/"))
        left_out = describe(found.left_out.get(b"", Counter()))
        if images and left_out:
            log_line(f"{path}: left out {left_out}")
        yield from (path / os.fsdecode(image) for image in images)
        yield from found.unreadable
        if not images and not found.unreadable:
            left_out = f" (left out: {left_out})" if left_out else ""
            yield UserError(
                f"{path} holds no image{left_out}; expected files such as .jpg and .png"
            )
