"""The names of a run's files: remembered whole, compared, and used to hold out the same val."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    assert_names,
    few_digits,
    file_names,
    load_folders,
    make_folders,
    refusal,
)

from early_exit.data import file_lists
from early_exit.data.base import FileData
from early_exit.data.file_lists import changes, remember, remembered, with_val_of
from early_exit.system.text import in_a_line

ODD = os.fsdecode(b"\xff caf\xc3\xa9\n.JPEG")


@pytest.fixture
def folders(tmp_path):
    """Three classes of 8 train and 4 test images, one with a name that is not UTF-8."""
    root = make_folders(tmp_path / "set")
    (root / "val" / "ape" / "0.JPEG").rename(root / "val" / "ape" / ODD)
    return root


@pytest.fixture
def run(tmp_path, folders):
    """A directory that remembers the files, and the data they were of."""
    before = load_folders(folders)
    remember(tmp_path / "run", before)
    return tmp_path / "run", before


def again(run, folders, **settings):
    directory, before = run
    now = load_folders(folders, **settings)
    return with_val_of(now, directory, before.val_hash)


def test_names_of_any_bytes_are_remembered(run):
    directory, data = run
    for split in ("train", "val", "test"):
        assert np.array_equal(remembered(directory, split), data.file_names(split))
    assert any(b"\xff" in name and b"\n" in name for name in remembered(directory, "test"))


def test_of_another_val_or_damaged_they_are_not_used(run):
    directory, data = run
    assert remembered(directory, "val", data.val_hash) is not None
    assert remembered(directory, "val", "another") is None
    file = directory / file_lists.NAME
    whole = file.read_bytes()
    start = whole.index(b"val.npy") + len(b"val.npy") + 20
    damaged = whole[:start] + bytes(40) + whole[start + 40 :]  # its table at the end is whole
    for content in (b"", whole[: len(whole) // 2], damaged):
        file.write_bytes(content)
        assert remembered(directory, "val") is None
    file.unlink()
    assert remembered(directory, "val") is None


def test_images_in_memory_and_noise_have_no_names(tmp_path):
    for data in (few_digits(0), load_folders("nowhere", dummy=500)):
        remember(tmp_path, data)
    assert not list(tmp_path.iterdir())
    assert not isinstance(few_digits(0), FileData)


def test_changes_are_counted_with_three_names():
    before = np.array([b"a", b"b", b"c", b"d", b"e"])
    assert changes(before, before) == changes(before, before[::-1]) == ""
    assert_names(changes(before, before[4:]), 4, "gone", "a, b, c and 1 more")
    assert_names(changes(before, np.append(before[1:], b"x")), "1 is gone (a)", "1 is new (x)")


def test_a_name_is_printed_in_one_line():
    assert in_a_line(os.fsencode(ODD)) == r"\xff café\n.JPEG"


def test_other_files_of_train_leave_val_as_it_was(run, folders):
    (folders / "train" / "ape" / "new.JPEG").write_bytes(b"")
    train = run[1].file_names("train")[0]
    (folders / "train" / os.fsdecode(train)).unlink()
    data, gone = again(run, folders)
    assert gone == () and data.val_hash == run[1].val_hash
    assert file_names(data, "val") == file_names(run[1], "val")
    assert set(file_names(data, "train")) == (
        {*file_names(run[1], "train"), str(folders / "train" / "ape" / "new.JPEG")}
        - {str(folders / "train" / os.fsdecode(train))}
    )


def test_val_images_that_are_gone_count_as_bad_files(run, folders):
    names = run[1].file_names("val")[:2].tolist()
    for name in names:
        (folders / "train" / os.fsdecode(name)).unlink()
    for allowed in (0, 1):
        message = refusal(again, run, folders, bad_files=allowed)
        assert_names(message, "2 are gone", names[0].decode(), "--bad-files")
    data, gone = again(run, folders, bad_files=2)
    assert gone == tuple(f"train/{name.decode()}" for name in names)
    assert file_names(data, "val") == file_names(run[1], "val")[2:]
    Path(file_names(data, "val")[0]).write_bytes(b"")  # together with the two, one too many
    assert_names(refusal(data.check_headers), 2, file_names(data, "val")[0], "--bad-files")
    again(run, folders, bad_files=3)[0].check_headers()


def test_another_data_set_of_the_same_classes_is_refused(run, tmp_path):
    other = make_folders(tmp_path / "other")
    for path in other.glob("train/*/*"):
        path.rename(path.with_name(f"other-{path.name}"))
    message = refusal(again, run, other, bad_files=1000)
    assert_names(message, "6 are gone", "24 are gone", "24 are new")
    assert "--bad-files" not in message


def test_without_names_both_hashes_are_told(run, folders):
    directory, before = run
    (directory / file_lists.NAME).unlink()
    assert again(run, folders)[0].val_hash == before.val_hash
    now = dataclasses.replace(load_folders(folders), val_hash="now")
    message = refusal(with_val_of, now, directory, before.val_hash)
    assert_names(message, before.val_hash, "now")
