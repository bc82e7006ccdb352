"""Unreadable files are found by their headers, before anything is decoded."""

import signal
import threading
import warnings
from pathlib import Path

import pytest
from helpers import assert_names, file_names, load_folders, make_folders, refusal
from PIL import Image

from early_exit.data import unreadable
from early_exit.data.sources import Files


@pytest.fixture
def folders(tmp_path):
    return make_folders(tmp_path / "set")


def test_held_out_files_without_a_header_are_named_together(folders, caplog):
    names = (
        file_names(load_folders(folders), "val")[:2]
        + file_names(load_folders(folders), "test")[3:4]
    )
    for name, content in zip(
        names, (b"", b"no image", Path(names[2]).read_bytes()[:80]), strict=True
    ):
        Path(name).write_bytes(content)
    Path(file_names(load_folders(folders), "train")[0]).write_bytes(b"")  # read in the first epoch
    message = refusal(load_folders(folders, bad_files=2).check_headers)
    assert_names(message, *names, "--bad-files")
    allowed = load_folders(folders, bad_files=3)
    allowed.check_headers()
    assert allowed.skipped == set(names)
    assert allowed.unreadable("val") == {
        row: str(Path(name).relative_to(folders)) for row, name in enumerate(names[:2])
    }
    assert list(allowed.unreadable("test")) == [3]
    for name in names:
        assert sum(name in line for line in caplog.messages) == 1


def test_every_held_out_file_is_read_once_and_no_other(folders, monkeypatch):
    data, seen = load_folders(folders), []
    monkeypatch.setattr(unreadable, "CHUNK", 4)
    monkeypatch.setattr(Files, "read_header", lambda files, row: seen.append(files.name(row)))
    data.check_headers()
    assert sorted(seen) == sorted([*file_names(data, "val"), *file_names(data, "test")])


def test_a_large_image_raises_no_warning(folders, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # less than the images have, not half
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_folders(folders).check_headers()


def test_a_signal_ends_it_while_storage_hangs(folders, monkeypatch):
    released, ended = threading.Event(), threading.Event()

    def hang(_files, _row):
        # again and again: a signal between two instructions does not wake a thread that then waits
        while not released.wait(0.1):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        ended.set()

    def interrupt(*_):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    monkeypatch.setattr(unreadable, "CHUNK", 100)
    monkeypatch.setattr(Files, "read_header", hang)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            load_folders(folders).check_headers()
        assert not ended.is_set()  # the storage still hangs
    finally:
        released.set()
        ended.wait(60)  # so that no more signals come
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "settings, flag",
    [({"bad_files": 1}, "--bad-files"), ({"check_files": False}, "--no-file-check")],
)
def test_settings_of_files_are_refused_for_noise(settings, flag):
    assert_names(refusal(load_folders, "nowhere", dummy=500, **settings), flag, "--dummy")
