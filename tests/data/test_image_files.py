"""Image files: which ones are found in folders, and how they are decoded."""

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_names, refusal
from PIL import Image

from early_exit.data.image_files import find_images, read_image

SIDE = 16


def save(path: Path) -> Path:
    """Writes a small image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), "red").save(path)
    return path


class TestReadImage:
    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
    def test_every_kind_of_image_is_read_as_rgb(self, mode):
        image = read_image(Image.new(mode, (20, 10)))
        assert (image.mode, image.size) == ("RGB", (20, 10))

    def test_a_path_and_an_image_give_the_same(self, tmp_path):
        path = save(tmp_path / "red.png")
        images = [read_image(source) for source in (path, str(path), Image.open(path))]
        assert len({image.tobytes() for image in images}) == 1
        assert images[0].getpixel((0, 0)) == (255, 0, 0)

    def test_an_image_is_rotated_as_its_exif_data_say(self, tmp_path):
        image = Image.new("RGB", (SIDE, SIDE))
        image.paste("white", (0, 0, SIDE, SIDE // 2))  # white above
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        image.save(tmp_path / "turned.png", exif=exif)
        pixels = np.asarray(read_image(tmp_path / "turned.png"))
        assert (pixels[:, SIDE // 2 :] == 255).all() and (pixels[:, : SIDE // 2] == 0).all()

    def test_sixteen_bits_show_what_eight_show(self, tmp_path):
        ramp = np.arange(SIDE, dtype=np.uint16)[None].repeat(SIDE, 0) * 4096
        Image.fromarray(ramp).save(tmp_path / "16.png")
        Image.fromarray((ramp // 256).astype(np.uint8)).save(tmp_path / "8.png")
        sixteen, eight = (np.asarray(read_image(tmp_path / f"{bits}.png")) for bits in (16, 8))
        assert np.array_equal(sixteen, eight)
        assert sixteen.max() == 240

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_pixels_without_a_known_white_are_refused(self, mode):
        assert_names(refusal(read_image, Image.new(mode, (20, 20))), 32)

    def test_a_huge_image_is_read_without_a_warning(self, tmp_path, monkeypatch):
        path = save(tmp_path / "huge.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE - 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(path).size == (SIDE, SIDE)

    def test_a_file_that_cannot_be_decoded_is_named(self, tmp_path):
        torn = tmp_path / "torn.png"
        torn.write_bytes(save(tmp_path / "whole.png").read_bytes()[:40])
        (tmp_path / "text.jpg").write_text("no image")
        (tmp_path / "empty").mkdir()
        for name in ("torn.png", "text.jpg", "empty", "none.png"):
            assert_names(refusal(read_image, tmp_path / name), tmp_path / name)
        assert os.strerror(errno.ENOENT) in refusal(read_image, tmp_path / "none.png")


class TestFindImages:
    def test_of_a_folder_the_images_below_it_in_order(self, tmp_path):
        for name in ("b/2.PNG", "a/1.jpg", "0.webp"):
            save(tmp_path / name)
        for name in ("a/text.pdf", "a/notes.txt"):
            (tmp_path / name).write_text("no image")
        found = [str(path.relative_to(tmp_path)) for path in find_images([tmp_path])]
        assert found == ["0.webp", "a/1.jpg", "b/2.PNG"]

    def test_a_file_is_given_as_it_is_named(self, tmp_path):
        names = [tmp_path / "text.pdf", str(tmp_path / "none")]
        assert list(find_images(names)) == [tmp_path / "text.pdf", tmp_path / "none"]

    def test_a_folder_without_images_is_given_to_be_reported(self, tmp_path):
        (tmp_path / "text.pdf").write_text("no image")
        assert list(find_images([tmp_path])) == [tmp_path]


def test_decoding_needs_no_torch():
    code = "import sys, early_exit.data.image_files; assert 'torch' not in sys.modules"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
