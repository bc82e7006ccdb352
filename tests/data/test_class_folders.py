"""Class folders: which images belong to which class, and what is refused."""

import errno
import hashlib
import logging
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers import (
    assert_names,
    fail_to_list,
    file_names,
    forbid,
    load_folders,
    make_folders,
    refusal,
)
from PIL import Image
from torchvision.datasets import ImageFolder

from early_exit.data.class_folders import LooseImages, class_folders
from early_exit.errors import Unavailable, UserError


@pytest.fixture
def folders(tmp_path):
    """Three classes of 8 train and 4 test images."""
    return make_folders(tmp_path / "set")


def add(path: Path) -> Path:
    """Writes a small image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


@pytest.fixture
def said(caplog):
    """A function that loads class folders and gives the lines that are logged."""
    caplog.set_level(logging.INFO)

    def load(root: Path) -> list[str]:
        caplog.clear()
        class_folders(root)
        return caplog.messages

    return load


class TestImages:
    def test_they_are_torchvisions_in_its_order(self, folders, said):
        """Or runs that were trained earlier could not be evaluated."""
        for name in ("ape/x/0.png", "ape/x-/1.PNG", "bee/\u00e4.bmp", "bee/Z.webp"):
            add(folders / "train" / name)
        classes, sources = class_folders(folders)
        train, expected = sources["train"], ImageFolder(folders / "train")
        assert list(classes) == expected.classes
        assert [
            (train.name(row), target) for row, target in enumerate(train.targets)
        ] == expected.samples
        names = (path[len(f"{folders}/train/") :] for path, _ in expected.samples)
        digest = hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest()[:16]
        assert train.digest == digest
        assert said(folders) == []

    def test_what_is_not_data_changes_nothing(self, folders, said):
        clean = load_folders(folders)
        for split in ("train", "val"):
            add(folders / split / ".ipynb_checkpoints" / "0-checkpoint.jpg")
            shutil.copytree(folders / split / "ape", folders / split / "ape" / ".ipynb_checkpoints")
            add(folders / split / "bee" / "@eaDir" / "0.JPEG" / "SYNOPHOTO_THUMB_M.jpg")
            for path in (folders / split / "cat").glob("*.JPEG"):
                path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
            (folders / split / "lost+found").mkdir()
            (folders / split / "cat" / "self").symlink_to(".")
            (folders / split / "all").symlink_to(".")
            (folders / split / "up").symlink_to("..")
        loaded = load_folders(folders)
        assert (loaded.classes, loaded.val_hash) == (clean.classes, clean.val_hash)
        for split in ("train", "val", "test"):
            assert file_names(loaded, split) == file_names(clean, split)
        train, val = said(folders)  # one line each
        assert str(folders / "train") in train and str(folders / "val") in val

    def test_what_is_left_out_is_counted(self, folders, said):
        for name in ("ape/0.heic", "ape/1.heic", "bee/notes.txt"):
            (folders / "train" / name).touch()
        (line,) = said(folders)
        assert_names(line, folders / "train", ".heic", 2, ".txt", 1)

    def test_images_beside_class_folders_are_counted(self, folders, said):
        for number in range(3):
            add(folders / "val" / f"{number}.png")
        (line,) = said(folders)
        assert_names(line, folders / "val", 3, "0.png")

    def test_classes_may_be_links(self, folders, tmp_path):
        before = load_folders(folders)
        (folders / "train").rename(tmp_path / "pool")
        (folders / "train").mkdir()
        for name in ("ape", "bee", "cat"):
            (folders / "train" / name).symlink_to(tmp_path / "pool" / name)
        assert load_folders(folders).val_hash == before.val_hash


class TestLayout:
    def test_no_directory(self, tmp_path):
        message = refusal(load_folders, tmp_path / "nothing")
        assert str(tmp_path / "nothing") in message
        assert "train/CLASS" in message and "val/CLASS" in message

    def test_the_classes_do_not_depend_on_the_locale(self, folders, monkeypatch):
        for split in ("train", "val"):
            (folders / split / "ape").rename(folders / split / "\u732b")
        monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
        classes, _ = class_folders(folders)
        assert "\u732b" in classes

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_a_missing_split(self, folders, split):
        (folders / split).rename(folders / "other")
        assert_names(refusal(load_folders, folders), folders / split, "other")

    @pytest.mark.parametrize("name", ["test", "validation", "valid"])
    def test_another_name_for_val(self, folders, said, name):
        (folders / "val").rename(folders / name)
        (line,) = said(folders)
        assert_names(line, folders / "val", folders / name)
        loaded = load_folders(folders)
        assert loaded.size("test") == 12
        assert file_names(loaded, "test")[0].startswith(f"{folders}/{name}/")

    def test_val_and_test(self, folders, said):
        shutil.copytree(folders / "val", folders / "test")
        (line,) = said(folders)
        assert_names(line, folders / "val", folders / "test")
        assert file_names(load_folders(folders), "test")[0].startswith(f"{folders}/val/")

    @pytest.mark.parametrize(("split", "name"), [("train", "Train"), ("val", "testing")])
    def test_a_name_that_is_nearly_right(self, folders, split, name):
        (folders / split).rename(folders / name)
        assert_names(refusal(load_folders, folders), folders / name, f"rename it to {split}")

    def test_archives(self, folders):
        shutil.rmtree(folders / "train")
        (folders / "train.tar").touch()
        assert "extract" in refusal(load_folders, folders)
        (folders / "train").mkdir()
        (folders / "train" / "ape.zip").touch()
        assert "extract" in refusal(load_folders, folders)

    def test_a_directory_that_cannot_be_listed(self, folders, monkeypatch):
        (folders / "train").rename(folders / "other")
        monkeypatch.setattr(os, "listdir", Mock(side_effect=PermissionError(13, "no listing")))
        assert_names(refusal(load_folders, folders), folders, "no listing")

    def test_a_file_in_the_place_of_val(self, folders):
        shutil.rmtree(folders / "val")
        (folders / "val").touch()
        assert "not a folder" in refusal(load_folders, folders)

    @pytest.mark.parametrize("given", ["Data/set/train", "Data/set/train/ape", "Data", "."])
    def test_a_directory_near_the_data_set(self, tmp_path, given):
        folders = make_folders(tmp_path / "Data" / "set", 1, 1)
        message = refusal(load_folders, tmp_path / given)
        assert_names(message, tmp_path / given / "train", folders)

    def test_links_that_lead_nowhere(self, folders, tmp_path):
        (tmp_path / "link").symlink_to("none")
        assert_names(refusal(load_folders, tmp_path / "link"), tmp_path / "link", "link")
        shutil.rmtree(folders / "val")
        (folders / "val").symlink_to("none")
        assert "link" in refusal(load_folders, folders)

    def test_no_class_folders(self, folders):
        shutil.rmtree(folders / "train")
        (folders / "train" / ".hidden").mkdir(parents=True)
        (folders / "train" / "images.tar").touch()
        assert_names(refusal(load_folders, folders), folders / "train", ".tar", 1)

    def test_images_without_class_folders(self, folders):
        shutil.rmtree(folders / "val")
        add(folders / "val" / "17.png")
        with pytest.raises(LooseImages) as caught:
            load_folders(folders)
        assert_names(str(caught.value), folders / "val", 1, "17.png", "CLASS")
        assert (caught.value.folder, caught.value.example) == (folders / "val", "17.png")

    def test_an_empty_class_folder(self, folders):
        for path in (folders / "val" / "cat").iterdir():
            path.rename(path.with_suffix(".heic"))
        assert_names(refusal(load_folders, folders), folders / "val" / "cat", ".heic", 4)

    def test_one_class(self, folders):
        for split in ("train", "val"):
            (folders / split).rename(folders / "classes")
            (folders / split).mkdir()
            (folders / "classes").rename(folders / split / "classes")
        message = refusal(load_folders, folders)
        assert_names(message, folders / "train" / "classes", "ape", "bee", "cat")

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_classes_that_differ(self, folders, split):
        add(folders / split / "dog" / "0.png")
        message = refusal(load_folders, folders)
        assert f"{folders}/{split}" in message and "dog" in message

    def test_a_class_that_is_spelled_otherwise(self, folders):
        (folders / "val" / "ape").rename(folders / "val" / "Ape")
        near = refusal(load_folders, folders)
        (folders / "val" / "Ape").rename(folders / "val" / "dog")
        far = refusal(load_folders, folders)
        assert "(it has one spelled" in near and "(it has one spelled" not in far

    def test_a_class_that_is_a_link_to_another(self, folders):
        for split in ("train", "val"):
            (folders / split / "kitty").symlink_to("cat")
        assert_names(refusal(load_folders, folders), folders / "train" / "kitty")


class TestApart:
    """No test image is trained on because links make it a part of both."""

    def test_one_folder_as_train_and_val(self, folders):
        shutil.rmtree(folders / "val")
        (folders / "val").symlink_to("train")
        assert_names(refusal(load_folders, folders), folders / "train", folders / "val")

    @pytest.mark.parametrize("link, target", [("train", "val"), ("val", "train")])
    def test_a_folder_in_the_other(self, folders, link, target):
        (folders / link / "ape" / "more").symlink_to(folders / target / "ape")
        message = refusal(load_folders, folders)
        assert_names(message, folders / link / "ape" / "more", folders / target / "ape")

    @pytest.mark.parametrize("link, target", [("train", "val"), ("val", "train")])
    def test_a_file_in_the_other(self, folders, link, target):
        (folders / link / "ape" / "x.JPEG").symlink_to(f"../../{target}/ape/0.JPEG")
        assert_names(refusal(load_folders, folders), folders / link / "ape" / "x.JPEG", 1)

    @pytest.mark.parametrize("link, target", [("train", "val"), ("val", "train")])
    def test_a_link_to_a_link_to_a_file_in_the_other(self, folders, tmp_path, link, target):
        (tmp_path / "list").mkdir()
        between = tmp_path / "list" / "x.JPEG"
        between.symlink_to(folders / target / "ape" / "0.JPEG")
        (folders / link / "ape" / "x.JPEG").symlink_to(between)
        assert_names(refusal(load_folders, folders), folders / link / "ape" / "x.JPEG", 1)

    def test_an_image_beside_the_class_folders_is_in_no_class(self, folders):
        add(folders / "train" / "x.png")
        (folders / "val" / "ape" / "x.png").symlink_to("../../train/x.png")
        assert load_folders(folders).size("test") == 13

    def test_two_links_to_one_file(self, folders, tmp_path):
        image = add(tmp_path / "pool" / "1.png")
        (folders / "train" / "ape" / "x.png").symlink_to(image)
        assert load_folders(folders).size("test") == 12
        (folders / "val" / "ape" / "x.png").symlink_to(image)
        assert_names(refusal(load_folders, folders), "x.png")


class TestCopies:
    """An image in two classes of train may be trained on and in val."""

    def test_links_from_one_class_to_another_are_told(self, folders, tmp_path, caplog):
        (folders / "train" / "ape" / "y.JPEG").symlink_to("../bee/0.JPEG")
        caplog.set_level(logging.INFO)
        load_folders(folders)
        assert_names("".join(caplog.messages), 1, "ape/y.JPEG", "val")

    def test_links_from_two_classes_to_one_image_are_told(self, folders, tmp_path, caplog):
        image = add(tmp_path / "pool" / "1.png")
        for name in ("ape", "bee"):
            (folders / "train" / name / "x.png").symlink_to(image)
        caplog.set_level(logging.INFO)
        load_folders(folders)
        assert_names("".join(caplog.messages), 2, "ape/x.png", "val")

    def test_other_links_are_not(self, folders, tmp_path, caplog):
        for name in ("ape", "bee"):
            (folders / "train" / name / "x.png").symlink_to(add(tmp_path / f"{name}.png"))
        (folders / "train" / "ape" / "twin.JPEG").symlink_to("0.JPEG")
        caplog.set_level(logging.INFO)
        load_folders(folders)
        assert not any("another class" in message for message in caplog.messages)


class TestUnreadable:
    @pytest.mark.parametrize("where", ["train", "train/ape", "train/ape/deep", "val/bee"])
    @pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE])
    def test_a_folder_is_named(self, folders, monkeypatch, where, code):
        add(folders / "train" / "ape" / "deep" / "1.png")
        fail_to_list(monkeypatch, folders / where, code)
        with pytest.raises(UserError) as caught:
            load_folders(folders)
        assert_names(str(caught.value), folders / where, os.strerror(code))
        may_pass = code == errno.ESTALE
        assert isinstance(caught.value, Unavailable) == may_pass
        assert ("readable for this user" in str(caught.value)) != may_pass

    def test_a_folder_that_may_not_be_looked_at(self, folders, monkeypatch):
        forbid(monkeypatch, folders / "val")
        message = refusal(load_folders, folders)
        assert_names(message, folders / "val", os.strerror(errno.EACCES))
