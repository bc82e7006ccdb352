"""The decoder: one answer for every file, whatever Pillow is set to, and no output but its own."""

import errno
import logging
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_names, file_names, load_folders, make_folders, refusal
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo

from early_exit.data import decoding
from early_exit.data.decoding import Unreadable, check_header, decode, read_image

SIDE = 16
CORRUPT_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x07\0"  # which promises seven entries and has none


def save(path: Path, **options) -> Path:
    """Writes a small image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def torn(path: Path) -> Path:
    """An image of which the second half is missing."""
    data = save(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def claiming(path: Path, width: int, height: int) -> Path:
    """A PNG file that claims to be of a size, without any pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 0) + data + struct.pack(">I", zlib.crc32(data))
    )  # fmt: skip
    return path


class TestReadImage:
    def test_a_path_its_content_and_an_image_give_the_same(self, tmp_path):
        path = save(tmp_path / "noise.png")
        sources = (path, str(path), path.read_bytes(), Image.open(path))
        images = [read_image(source) for source in sources]
        assert len({image.tobytes() for image in images}) == 1
        assert {(image.mode, image.size) for image in images} == {("RGB", (SIDE, SIDE))}

    @pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
    @pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    def test_an_image_is_turned_as_its_exif_data_say(self, tmp_path, suffix, orientation):
        image = Image.new("RGB", (SIDE, 2 * SIDE))
        image.paste("red", (0, 0, SIDE, SIDE // 2))
        image.paste("lime", (0, 0, SIDE // 4, 2 * SIDE))
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"turned.{suffix}"
        image.save(path, exif=exif)
        with Image.open(path) as file:
            expected = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
            found = read_image(file)
        assert np.array_equal(np.asarray(found), expected)
        for source in (path, path.read_bytes()):
            assert np.array_equal(np.asarray(read_image(source)), expected)
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(found)), expected)  # not twice
        assert (found.size[0] > found.size[1]) == (orientation in (5, 6, 7, 8))

    @pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
    def test_of_several_frames_the_first(self, tmp_path, suffix):
        first, second = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue"))
        options = {"lossless": True} if suffix == "webp" else {}
        first.save(tmp_path / f"two.{suffix}", save_all=True, append_images=[second], **options)
        assert (np.asarray(read_image(tmp_path / f"two.{suffix}")) == [255, 0, 0]).all()

    def test_colour_profiles_are_ignored(self, tmp_path):
        plain = save(tmp_path / "plain.png")
        profiled = save(tmp_path / "profiled.png", icc_profile=b"not a profile")
        assert read_image(profiled).tobytes() == read_image(plain).tobytes()


class TestRefused:
    def test_a_file_that_cannot_be_decoded_is_named(self, tmp_path):
        torn(tmp_path / "torn.png")
        (tmp_path / "text.jpg").write_text("no image")
        (tmp_path / "empty").mkdir()
        for name in ("torn.png", "text.jpg", "empty", "none.png"):
            assert_names(refusal(read_image, tmp_path / name), tmp_path / name)
        assert os.strerror(errno.ENOENT) in refusal(read_image, tmp_path / "none.png")

    @pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp", "gif"])
    def test_a_torn_file_is_refused_even_if_pillow_may_load_it(self, tmp_path, monkeypatch, suffix):
        path = torn(tmp_path / f"torn.{suffix}")
        reason = refusal(read_image, path)
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        assert refusal(read_image, path) == reason
        assert ImageFile.LOAD_TRUNCATED_IMAGES

    @pytest.mark.parametrize("theirs", [None, 1, 2**40])
    def test_too_many_pixels(self, tmp_path, monkeypatch, theirs):
        """Whatever Pillow's own limit is."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", theirs)
        path = claiming(tmp_path / "bomb.png", 2**14, 2**14 + 1)
        for refused in (refusal(check_header, path), refusal(decode, path)):
            assert_names(
                refused, path, f"{decoding.MAX_PIXELS + 2**14:,}", f"{decoding.MAX_PIXELS:,}"
            )
        check_header(claiming(tmp_path / "large.png", 2**14, 2**14))
        assert theirs == Image.MAX_IMAGE_PIXELS

    def test_the_limit_is_one_of_images_in_memory_too(self, tmp_path, monkeypatch):
        path = save(tmp_path / "noise.png")
        monkeypatch.setattr(decoding, "MAX_PIXELS", SIDE * SIDE - 1)
        for source in (path, Image.new("RGB", (SIDE, SIDE))):
            assert_names(refusal(read_image, source), SIDE * SIDE, SIDE * SIDE - 1)
        monkeypatch.setattr(decoding, "MAX_PIXELS", SIDE * SIDE)
        assert read_image(path).size == (SIDE, SIDE)

    def test_a_lower_limit_for_one_image(self, tmp_path):
        content = save(tmp_path / "noise.png").read_bytes()
        refused = refusal(decode, content, SIDE * SIDE - 1)
        assert_names(refused, f"{len(content)} bytes", SIDE * SIDE, SIDE * SIDE - 1)
        assert decode(content, SIDE * SIDE)[0].size == (SIDE, SIDE)

    def test_an_empty_content(self):
        assert_names(refusal(decode, b""), "empty")

    @pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE])
    def test_an_error_of_the_machine_is_not_the_files(self, tmp_path, monkeypatch, number):
        def fail(*_args):
            raise OSError(number, os.strerror(number))

        Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
        monkeypatch.setattr(decoding, "open", fail, raising=False)
        for read in (decoding.decode, decoding.check_header):
            with pytest.raises(OSError) as caught:
                read(tmp_path / "good.png")
            assert caught.value.errno == number

    def test_no_pixels(self):
        assert_names(refusal(read_image, Image.new("RGB", (0, 5))), "0x5")

    def test_no_program_is_run(self, tmp_path):
        """Ghostscript."""
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "drawing.eps")
        assert "EPS" in refusal(read_image, tmp_path / "drawing.eps")

    def test_the_error_survives_a_process_border(self, tmp_path):
        with pytest.raises(Unreadable) as caught:
            decode(tmp_path / "none.png")
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.reason) == (str(caught.value), caught.value.reason)


class TestOutput:
    """What is odd about a file is said once with its name, and nothing is said raw."""

    @pytest.fixture(autouse=True)
    def nothing_raw(self, capfd, recwarn):
        """Nothing on the descriptors themselves, where libtiff writes, and no warning of Python."""
        warnings.simplefilter("always")
        yield
        shown = capfd.readouterr()
        assert (shown.out, shown.err) == ("", "")
        assert not recwarn.list

    def test_corrupt_exif_data(self, tmp_path, caplog):
        path = save(tmp_path / "odd.jpg", exif=CORRUPT_EXIF)
        expected = decode(save(tmp_path / "even.jpg"))[0]
        for _ in range(2):
            assert read_image(path).tobytes() == expected.tobytes()
        assert [str(path) in message for message in caplog.messages] == [True]
        assert "EXIF" in caplog.text

    def test_exif_data_that_are_no_data(self, tmp_path, caplog):
        text = PngInfo()
        text.add_text("Raw profile type exif", "\nexif\n4\nno hexadecimals")
        path = save(tmp_path / "odd.png", pnginfo=text)
        assert read_image(path).size == (SIDE, SIDE)
        assert_names(caplog.text, path, "EXIF")

    def test_a_palette_of_transparent_colours(self, tmp_path, caplog):
        image = Image.new("P", (SIDE, SIDE))
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.save(tmp_path / "palette.png", transparency=b"\x80\x40")
        read_image(tmp_path / "palette.png")
        assert not caplog.messages

    def test_a_damaged_tiff(self, tmp_path):
        """Of which libtiff itself would write."""
        path = save(tmp_path / "damaged.tif", compression="tiff_lzw")
        data = bytearray(path.read_bytes())
        data[20:60] = b"\xff" * 40
        path.write_bytes(data)
        assert_names(refusal(read_image, path), path)

    def test_a_damaged_tiff_without_that(self, tmp_path, monkeypatch, capfd):
        """So that the test above is one."""
        monkeypatch.setattr(decoding, "_set_libtiff_handler", lambda: lambda handler: handler)
        self.test_a_damaged_tiff(tmp_path)
        assert capfd.readouterr().err

    def test_a_large_image(self, tmp_path, monkeypatch):
        monkeypatch.setattr(decoding, "MAX_PIXELS", SIDE * SIDE)
        assert read_image(save(tmp_path / "large.png")).size == (SIDE, SIDE)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_does_not_speak_and_its_notice_is_logged_once(tmp_path, workers, capfd, caplog):
    root = make_folders(tmp_path / "set")
    odd = [save(root / split / "ape" / "odd.jpg", exif=CORRUPT_EXIF) for split in ("train", "val")]
    loaded = load_folders(root, workers=workers)
    caplog.set_level(logging.INFO)
    for epoch in range(3):
        list(loaded.train_batches(19, 0, epoch))
        for split in ("val", "test"):
            list(loaded.eval_batches(split, 5))
    loaded.picture("test", file_names(loaded, "test").index(str(odd[1])))
    del loaded  # and its workers with it
    for path in odd:
        assert sum(str(path) in message for message in caplog.messages) == 1
    assert len(caplog.messages) == 2
    assert capfd.readouterr().err == ""


def test_threads_take_turns(tmp_path):
    """Each gets its own notice, and Python's filters are as before."""
    even, odd = save(tmp_path / "even.jpg"), save(tmp_path / "odd.jpg", exif=CORRUPT_EXIF)
    before = list(warnings.filters), warnings.showwarning
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode, [even, odd] * 40))
    assert {bool(notice) for _, notice in found[::2]} == {False}
    assert {bool(notice) for _, notice in found[1::2]} == {True}
    assert (list(warnings.filters), warnings.showwarning) == before


def test_no_thread_waits_for_the_storage_of_another(tmp_path):
    """A pipe is storage that gives nothing until it is written to."""
    path, slow = save(tmp_path / "noise.png"), tmp_path / "slow.png"
    os.mkfifo(slow)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(check_header, slow)
        with slow.open("wb"):  # once the other end is open
            try:
                pool.submit(decode, path).result(60)
            finally:
                assert not waiting.done()
        with pytest.raises(Unreadable):
            waiting.result(60)


def test_a_process_does_not_wait_for_a_thread_of_its_parent(tmp_path):
    """Which held the lock when the process was made, and is not in it."""
    path = save(tmp_path / "noise.png")
    with ThreadPoolExecutor(1) as pool:
        held, released = threading.Event(), threading.Event()

        def hold():
            with decoding._one_at_a_time:
                held.set()
                released.wait()

        waiting = pool.submit(hold)
        held.wait()
        process = multiprocessing.get_context("fork").Process(target=check_header, args=(path,))
        process.start()
        released.set()
        process.join(60)
        process.kill()  # no harm to one that has ended
        waiting.result()
    assert process.exitcode == 0


def test_decoding_needs_no_torch():
    code = (
        "import sys, early_exit.data.decoding, early_exit.data.image_files\n"
        "assert 'torch' not in sys.modules"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
