"""Image files: which ones are found in folders."""

import errno
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT, assert_names, fail_to_list
from PIL import Image
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from early_exit.data.image_files import (
    AGAIN,
    BROKEN,
    HIDDEN,
    NO_SUFFIX,
    SPECIAL,
    SUFFIXES,
    describe,
    find_images,
    walk,
)
from early_exit.errors import UserError

SIDE = 16


def save(path: Path) -> Path:
    """Writes a small image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), "red").save(path)
    return path


def touch(folder: Path, *names: str) -> None:
    """Makes empty files: what is found depends on names and kinds alone."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, **options) -> list[str]:
    """The images that a walk finds, all groups in order."""
    return [
        os.fsdecode(path) for group in walk(folder, **options).images.values() for path in group
    ]


def left_out(folder: Path) -> Counter:
    """How many of each kind a walk leaves out."""
    return walk(folder).left_out.get(b"", Counter())


class TestWalk:
    def test_images_by_folder_then_by_name(self, tmp_path):
        touch(tmp_path, "b/2.PNG", "a/1.jpg", "a/x/0.tif", "a-/3.gif", "0.webp", "A.Jpeg")
        assert found(tmp_path) == [
            "0.webp",
            "A.Jpeg",
            "a/1.jpg",
            "a-/3.gif",
            "a/x/0.tif",
            "b/2.PNG",
        ]

    def test_the_order_is_torchvisions(self, tmp_path):
        names = ("0.jpg", "sub/1.png", "sub-x/0.PNG", "sub x/7.bmp", "sub/deep/\u00e4.jpg")
        for class_name in ("z", "a", "a b", "a-b", "\u00e9", "\U0001f600"):
            touch(tmp_path / class_name, *names, "Z.jpg", "\U0001f600.jpg", "\uffee.jpg")
        _, index = find_classes(tmp_path)
        samples = DatasetFolder.make_dataset(tmp_path, index, extensions=IMG_EXTENSIONS)
        expected = [str(Path(path).relative_to(tmp_path)) for path, _ in samples]
        groups = walk(tmp_path, by_class=True).images
        in_order = [os.fsdecode(path) for name in sorted(groups) for path in groups[name]]
        assert in_order == expected and len(in_order) == 6 * 8

    def test_the_order_does_not_depend_on_the_listings(self, tmp_path, monkeypatch):
        touch(tmp_path, "b/2.png", "b/1.png", "a/1.png")
        for name in ("n", "m"):
            (tmp_path / "b" / name).symlink_to(tmp_path / "a" / "1.png")
            (tmp_path / "b" / f"{name}.png").symlink_to(tmp_path / "b" / name)
        before, scandir = found(tmp_path), os.scandir

        @contextmanager
        def reverse(path):
            with scandir(path) as entries:
                yield sorted(entries, key=lambda entry: entry.name, reverse=True)

        assert before == ["a/1.png", "b/1.png", "b/2.png"]
        monkeypatch.setattr(os, "scandir", reverse)
        assert found(tmp_path) == before

    @pytest.mark.parametrize("depth", ["", "a/b/"])
    @pytest.mark.parametrize(
        "name",
        [
            *(".ipynb_checkpoints", ".Trash-1000", ".AppleDouble", ".git", "@eaDir", "#recycle"),
            *("lost+found", "__MACOSX", "$RECYCLE.BIN", "$Recycle.Bin", "@Recycle"),
            *("System Volume Information", "#snapshot", "~snapshot", ".@__thumb"),
        ],
    )
    def test_no_hidden_folder_or_systems_folder(self, tmp_path, name, depth):
        touch(tmp_path, f"{depth}{name}/1.jpg", f"{depth}{name}/x/2.jpg", "1.jpg")
        assert found(tmp_path) == ["1.jpg"]
        assert left_out(tmp_path) == {HIDDEN: 1}

    def test_no_companion_of_a_file(self, tmp_path):
        touch(tmp_path, "1.jpg", "._1.jpg", ".1.jpg", "a/._2.PNG", ".DS_Store", "Thumbs.db")
        touch(tmp_path, "1.jpg:Zone.Identifier", "desktop.ini", "Icon\r")
        assert found(tmp_path) == ["1.jpg"]
        assert left_out(tmp_path) == {HIDDEN: 3}  # the others could be no images

    def test_the_folder_itself_may_have_any_name(self, tmp_path):
        touch(tmp_path, ".hidden/@eaDir/1.jpg")
        assert found(tmp_path / ".hidden" / "@eaDir") == ["1.jpg"]
        assert found(tmp_path) == []

    def test_other_suffixes_are_counted(self, tmp_path):
        touch(tmp_path, "1.heic", "2.HEIC", "a.h5", "b.pdf", "c.mpg", "README", "1.jpg~", "1.jpg")
        assert found(tmp_path) == ["1.jpg"]
        counts = {".heic": 2, ".h5": 1, ".pdf": 1, ".mpg": 1, NO_SUFFIX: 1, ".jpg~": 1}
        assert left_out(tmp_path) == counts
        assert describe(Counter(counts)).startswith(".heic (2), ")
        assert "5 other" in describe(Counter({f".{number}": 1 for number in range(11)}))

    def test_every_suffix_can_be_decoded(self):
        plugins = Image.registered_extensions()
        formats = {plugins[os.fsdecode(suffix)] for suffix in SUFFIXES} - {"MPO"}  # read as a JPEG
        assert formats - {"AVIF"} <= set(Image.OPEN)  # not in every build

    def test_regular_files_only(self, tmp_path):
        os.mkfifo(tmp_path / "1.jpg")
        touch(tmp_path, "folder.jpg/2.jpg")
        assert found(tmp_path) == ["folder.jpg/2.jpg"]
        assert left_out(tmp_path) == {SPECIAL: 1}

    def test_names_of_any_bytes(self, tmp_path):
        if sys.platform == "darwin":
            pytest.skip("file names are UTF-8 on macOS")
        for name in (b"\xff.jpg", b"a\nb.jpg", "\U0001f600.jpg".encode(), b"\xed\xff/ .png"):
            touch(tmp_path, os.fsdecode(name))
        (names,) = walk(tmp_path).images.values()
        assert names == [b"a\nb.jpg", "\U0001f600.jpg".encode(), b"\xff.jpg", b"\xed\xff/ .png"]

    def test_a_file_is_never_looked_at(self, tmp_path, monkeypatch):
        touch(tmp_path, *(f"{folder}/{number}.jpg" for folder in "ab" for number in range(20)))
        calls, look = [], os.stat
        monkeypatch.setattr(os, "stat", lambda path, **options: calls.append(path) or look(path))
        assert len(found(tmp_path)) == 40
        assert not [path for path in calls if os.fsencode(path).endswith(b".jpg")]


class TestLinks:
    def test_to_folders_above_add_nothing(self, tmp_path):
        touch(tmp_path, "set/a/1.jpg", "set/b/2.jpg", "other/3.jpg")
        for link, target in (("set/loop", "."), ("set/a/up", "../.."), ("set/b/root", "/")):
            (tmp_path / link).symlink_to(target)
        assert found(tmp_path / "set") == ["a/1.jpg", "b/2.jpg"]
        assert left_out(tmp_path / "set") == {AGAIN: 3}
        assert list(walk(tmp_path / "set", by_class=True).images) == [b"", b"a", b"b"]

    def test_each_folder_is_listed_once_at_its_own_place(self, tmp_path):
        touch(tmp_path, "set/z/1.jpg", "pool/x/2.jpg")
        for link, target in (("a", "set/z"), ("b", "pool"), ("c", "pool/x"), ("d.jpg", "pool")):
            (tmp_path / "set" / link).symlink_to(tmp_path / target)
        assert found(tmp_path / "set") == ["b/x/2.jpg", "z/1.jpg"]
        assert left_out(tmp_path / "set") == {AGAIN: 3}

    def test_to_files_elsewhere(self, tmp_path):
        """As in a data set made of links, whose targets may be hidden and without a suffix."""
        touch(tmp_path, ".pool/17", ".pool/18", "17.txt")
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "1.jpg").symlink_to("../.pool/17")
        (tmp_path / "set" / "2.txt").symlink_to("../.pool/18")
        assert found(tmp_path / "set") == ["1.jpg"]
        assert left_out(tmp_path / "set") == {".txt": 1}

    def test_two_to_one_file_count_once_in_a_class(self, tmp_path):
        touch(tmp_path, "pool/1", "set/a/4.jpg", "set/a/5.jpg")
        for name in ("a/2.jpg", "a/3.jpg", "a/x/3.jpg", "b/2.jpg"):
            (tmp_path / "set" / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / "set" / name).symlink_to(tmp_path / "pool" / "1")
        (tmp_path / "set/a/0.jpg").symlink_to("5.jpg")
        assert found(tmp_path / "set", by_class=True) == [
            "a/2.jpg",
            "a/4.jpg",
            "a/5.jpg",
            "b/2.jpg",
        ]
        assert found(tmp_path / "set") == ["a/2.jpg", "a/4.jpg", "a/5.jpg"]

    def test_files_of_equal_content_are_several(self, tmp_path):
        touch(tmp_path, "1.jpg", "2.jpg")
        os.link(tmp_path / "1.jpg", tmp_path / "3.jpg")
        assert len(found(tmp_path)) == 3

    def test_broken_ones_are_counted(self, tmp_path):
        touch(tmp_path, "1.jpg")
        for name, target in (("2.jpg", "none"), ("3.jpg", "3.jpg"), ("4.jpg", "1.jpg/x")):
            (tmp_path / name).symlink_to(target)
        assert found(tmp_path) == ["1.jpg"]
        assert left_out(tmp_path) == {BROKEN: 3}


class TestUnreadable:
    @pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO])
    def test_a_folder_at_any_depth(self, tmp_path, monkeypatch, code):
        touch(tmp_path, "a/x/1.jpg", "b/2.jpg")
        fail_to_list(monkeypatch, tmp_path / "a" / "x", code)
        assert found(tmp_path) == ["b/2.jpg"]
        (error,) = walk(tmp_path).unreadable
        assert_names(str(error), tmp_path / "a" / "x", os.strerror(code))

    def test_the_target_of_a_link(self, tmp_path, monkeypatch):
        touch(tmp_path, "set/1.jpg", "other/2.jpg")
        (tmp_path / "set" / "2.jpg").symlink_to(tmp_path / "other" / "2.jpg")

        class Entry:
            """An entry whose target may not be looked at."""

            def __init__(self, entry):
                self.name, self.is_file, self.is_dir = entry.name, entry.is_file, entry.is_dir
                self.is_symlink = entry.is_symlink

            def stat(self):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        scandir = os.scandir

        @contextmanager
        def entries_of(path):
            with scandir(path) as entries:
                yield map(Entry, entries)

        monkeypatch.setattr(os, "scandir", entries_of)
        assert found(tmp_path / "set") == ["1.jpg"]
        (error,) = walk(tmp_path / "set").unreadable
        assert_names(str(error), tmp_path / "set" / "2.jpg")

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
    def test_a_folder_of_another_user(self, tmp_path):
        touch(tmp_path, "a/1.jpg", "b/2.jpg")
        (tmp_path / "a").chmod(0o700)
        for folder in (tmp_path, *tmp_path.parents[:-2]):
            folder.chmod(folder.stat().st_mode | 0o055)
        code = f"""
import os, sys
from early_exit.data.image_files import find_images
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(*find_images([{str(tmp_path)!r}], print), sep="\\n")
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        image, error = done.stdout.splitlines()
        assert image == str(tmp_path / "b" / "2.jpg")
        assert_names(error, tmp_path / "a", os.strerror(errno.EACCES))


class TestFindImages:
    def test_a_file_is_given_as_it_is_named(self, tmp_path):
        touch(tmp_path, ".hidden.jpg", "text.pdf")
        names = [tmp_path / "text.pdf", str(tmp_path / "none"), tmp_path / ".hidden.jpg", "a\0b"]
        assert list(find_images(names, pytest.fail)) == [Path(name) for name in names]

    def test_the_images_of_a_folder_in_the_order_of_their_paths(self, tmp_path):
        touch(tmp_path, "b/1.png", "a.png", "c.png", "b/x/2.png", "b-/1.png", "b/y.png")
        expected = ["a.png", "b/1.png", "b/x/2.png", "b/y.png", "b-/1.png", "c.png"]
        assert list(find_images([tmp_path], print)) == [tmp_path / name for name in expected]

    def test_what_is_left_out_of_a_folder_is_told_in_a_line(self, tmp_path):
        touch(tmp_path, "a/1.jpg", "a/2.heic", "b/3.jpg")
        lines = []
        images = list(find_images([tmp_path / "a", tmp_path / "b"], lines.append))
        assert images == [tmp_path / "a" / "1.jpg", tmp_path / "b" / "3.jpg"]
        (line,) = lines
        assert_names(line, tmp_path / "a", ".heic", 1)

    def test_an_empty_name_is_not_the_working_directory(self, tmp_path, monkeypatch):
        touch(tmp_path, "a.png")
        monkeypatch.chdir(tmp_path)
        error, image = find_images(["", "a.png"], pytest.fail)
        assert isinstance(error, UserError) and image == Path("a.png")
        assert_names(str(error), "empty")

    def test_a_folder_without_images_is_an_error_that_says_what_it_has(self, tmp_path):
        touch(tmp_path, "text.pdf")
        (error,) = find_images([tmp_path], pytest.fail)
        assert isinstance(error, UserError)
        assert_names(str(error), tmp_path, ".pdf", 1)

    def test_a_folder_that_cannot_be_listed_is_not_called_empty(self, tmp_path, monkeypatch):
        touch(tmp_path, "a/1.jpg")
        fail_to_list(monkeypatch, tmp_path, errno.EACCES)
        (error,) = find_images([tmp_path], pytest.fail)
        assert_names(str(error), tmp_path, os.strerror(errno.EACCES))


def test_decoding_needs_no_torch():
    code = "import sys, early_exit.data.image_files; assert 'torch' not in sys.modules"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
