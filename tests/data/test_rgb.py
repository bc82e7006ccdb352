"""Images of every kind as RGB: transparency, bits, and what is refused."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_names, refusal
from PIL import Image, TiffImagePlugin

from early_exit.data.decoding import read_image
from early_exit.data.rgb import BACKGROUND

SIDE = 16
RED = (200, 30, 10)
RAMP = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)  # every byte once


def pixels(source) -> np.ndarray:
    return np.asarray(read_image(source))


def png(path: Path, depth: int, kind: int, rows: np.ndarray, **chunks: bytes) -> Path:
    """Writes a PNG file of any depth and kind; rows: of bytes, (H, bytes of a row)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(name.encode(), data) for name, data in chunks.items())
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )
    return path


def tiff(
    data: bytes,
    order: str = "<",
    channels: int = 1,
    bits: int = 16,
    photometric: int = 1,
    packed: bool = False,
) -> bytes:
    """A TIFF file of one strip, as Pillow does not write it.

    order: of bytes, as numpy names it; photometric: 0: white is 0, 1: black is 0, 2: RGB.
    """
    data = zlib.compress(data) if packed else data
    tags = [
        (256, SIDE),
        (257, SIDE),
        (258, bits),
        (259, 8 if packed else 1),
        (262, photometric),
        (273, 200),  # where the strip begins
        (277, channels),
        (278, SIDE),
        (279, len(data)),
    ]
    if channels == 3:
        tags[2] = (258, 190)  # where three numbers are
    found = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    for tag, value in tags:
        count = 3 if tag == 258 and channels == 3 else 1
        found += struct.pack(f"{order}HHII", tag, 4 if count == 1 else 3, count, value)
    found += struct.pack(f"{order}I", 0)
    return (
        found.ljust(190, b"\0")
        + struct.pack(f"{order}3H", bits, bits, bits).ljust(10, b"\0")
        + data
    )


class TestOrdinary:
    """What Pillow converts well is what Pillow gives."""

    @pytest.mark.parametrize("mode", ["RGB", "L"])
    @pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg", "tif", "ppm", "gif"])
    @pytest.mark.parametrize("white", [255, 12])  # also if it is dark
    def test_of_eight_bits(self, tmp_path, suffix, mode, white):
        path = tmp_path / f"plain.{suffix}"
        noise = Image.effect_noise((SIDE, SIDE), 80).point(lambda value: value * white // 255)
        noise.convert(mode).save(path)
        with Image.open(path) as file:
            expected = np.asarray(file.convert("RGB"))
        assert np.array_equal(pixels(path), expected)

    def test_a_plain_ppm_of_eight_bits(self, tmp_path):
        (tmp_path / "dark.ppm").write_bytes(b"P3 1 1 255 1 2 3")
        assert pixels(tmp_path / "dark.ppm").tolist() == [[[1, 2, 3]]]

    @pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
    def test_other_modes(self, mode):
        coloured = Image.fromarray(np.dstack([RAMP, RAMP.T, RAMP[::-1]]).astype(np.uint8))
        if mode == "LAB":
            image = Image.frombytes("LAB", (SIDE, SIDE), coloured.tobytes())
        else:
            image = coloured.convert(mode)
        assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))

    def test_inverted_cmyk(self, tmp_path):
        """Adobe's CMYK JPEGs are stored inverted."""
        path = tmp_path / "cmyk.jpg"
        image = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))
        image.save(path, quality=100)
        assert b"Adobe" in path.read_bytes()
        assert np.allclose(pixels(path), [255, 0, 0], atol=4)

    def test_the_image_itself_is_not_changed(self):
        image = Image.new("RGB", (SIDE, SIDE), RED)
        read_image(image).putpixel((0, 0), (0, 0, 0))
        assert image.getpixel((0, 0)) == RED


class TestTransparency:
    """A red square whose left half is transparent, with noise under it."""

    @pytest.fixture
    def alpha(self):
        alpha = np.full((SIDE, SIDE), 255, np.uint8)
        alpha[:, : SIDE // 2] = 0
        return alpha

    def assert_half(self, found, colour=RED):
        assert (found[:, : SIDE // 2] == BACKGROUND).all()
        assert (found[:, SIDE // 2 :] == colour).all()

    @pytest.mark.parametrize("suffix", ["png", "tif", "webp", "tga"])
    def test_rgba(self, tmp_path, alpha, suffix):
        image = Image.new("RGB", (SIDE, SIDE), RED)
        image.paste(Image.effect_noise((SIDE // 2, SIDE), 90))
        image.putalpha(Image.fromarray(alpha))
        options = {"lossless": True, "exact": True} if suffix == "webp" else {}
        image.save(tmp_path / f"half.{suffix}", **options)
        self.assert_half(pixels(tmp_path / f"half.{suffix}"))
        self.assert_half(pixels(image))

    @pytest.mark.parametrize("mode", ["LA", "La", "RGBa"])
    def test_other_modes_with_alpha(self, alpha, mode):
        image = Image.merge("LA", [Image.new("L", (SIDE, SIDE), 90), Image.fromarray(alpha)])
        image = image.convert("RGBA").convert("RGBa") if mode == "RGBa" else image.convert(mode)
        self.assert_half(pixels(image), (90, 90, 90))

    def test_half_transparent(self):
        image = Image.new("RGBA", (SIDE, SIDE), (0, 100, 255, 51))
        assert (pixels(image) == [204, 224, 255]).all()  # a fifth of it and four fifths of white

    @pytest.mark.parametrize(
        "suffix, transparency", [("png", 1), ("png", b"\xff\x00\xff"), ("gif", 1)]
    )
    def test_palettes(self, tmp_path, alpha, suffix, transparency):
        image = Image.fromarray(np.where(alpha, 2, 1).astype(np.uint8)).convert("P")
        image.putpalette([9, 9, 9, 0, 0, 255, *RED])
        image.save(tmp_path / f"half.{suffix}", transparency=transparency)
        self.assert_half(pixels(tmp_path / f"half.{suffix}"))

    def test_a_palette_with_alpha(self, alpha):
        image = Image.fromarray(np.where(alpha, 2, 1).astype(np.uint8)).convert("P")
        image.putpalette([9, 9, 9, 255, 0, 0, 255, 0, *RED, 255], "RGBA")
        self.assert_half(pixels(image))
        self.assert_half(pixels(image.convert("PA")))

    @pytest.mark.parametrize("mode, clear", [("L", 7), ("RGB", (7, 7, 7))])
    def test_one_transparent_value(self, tmp_path, alpha, mode, clear):
        image = Image.new("RGB", (SIDE, SIDE), RED)
        image.paste((7, 7, 7), (0, 0, SIDE // 2, SIDE))
        image.convert(mode).save(tmp_path / "half.png", transparency=clear)
        grey = Image.new("RGB", (1, 1), RED).convert("L").getpixel((0, 0))
        self.assert_half(pixels(tmp_path / "half.png"), RED if mode == "RGB" else (grey,) * 3)

    @pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
    def test_one_transparent_value_of_any_depth(self, tmp_path, alpha, depth):
        """The values are 0, which is transparent, and the largest; or the other way round."""
        rows = np.packbits(np.repeat(alpha > 0, depth, axis=1), axis=1)
        path = png(tmp_path / "0.png", depth, 0, rows, tRNS=struct.pack(">H", 0))
        self.assert_half(pixels(path), (255, 255, 255))
        path = png(tmp_path / "1.png", depth, 0, ~rows, tRNS=struct.pack(">H", 2**depth - 1))
        self.assert_half(pixels(path), (0, 0, 0))

    def test_one_transparent_colour_of_sixteen_bits(self, tmp_path, alpha):
        values = np.where(alpha[..., None], [60000, 30000, 20000], [500, 600, 700])
        rows = values.astype(">u2").reshape(SIDE, -1).view(np.uint8)
        path = png(tmp_path / "half.png", 16, 2, rows, tRNS=struct.pack(">HHH", 500, 600, 700))
        self.assert_half(pixels(path), (60000 >> 8, 30000 >> 8, 20000 >> 8))


class TestBits:
    """Values of more than eight bits, whose white is the file's."""

    @pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_grey(self, tmp_path, bits, suffix):
        path = tmp_path / f"grey.{suffix}"
        Image.fromarray(RAMP << (bits - 8)).save(path)
        assert np.array_equal(pixels(path)[..., 0], RAMP)
        with Image.open(path) as image:
            assert np.array_equal(pixels(image)[..., 0], RAMP)
            assert np.array_equal(pixels(image)[..., 2], RAMP)  # also after it was decoded

    @pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
    @pytest.mark.parametrize("kind, channels", [(2, 3), (6, 4), (4, 2)])
    def test_colour_and_alpha_in_png(self, tmp_path, bits, kind, channels):
        opaque = np.full_like(RAMP, 65535 >> (16 - bits))
        layers = [RAMP << (bits - 8)] * channels
        if channels != 3:
            layers[-1] = opaque
        rows = np.dstack(layers).astype(">u2").reshape(SIDE, -1).view(np.uint8)
        found = pixels(png(tmp_path / "wide.png", 16, kind, rows))
        assert np.array_equal(found, np.dstack([RAMP] * 3))

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("packed", [False, True])  # read by Pillow, or by libtiff
    @pytest.mark.parametrize("bits", [12, 16])
    def test_colour_in_tiff(self, tmp_path, order, packed, bits):
        values = np.dstack([RAMP << (bits - 8)] * 3).astype(f"{order}u2").tobytes()
        path = tmp_path / "wide.tif"
        path.write_bytes(tiff(values, order, channels=3, photometric=2, packed=packed))
        assert np.array_equal(pixels(path), np.dstack([RAMP] * 3))

    @pytest.mark.parametrize("bits", [10, 12, 14, 16])
    def test_colour_in_ppm(self, tmp_path, bits):
        values = np.dstack([RAMP << (bits - 8)] * 3).astype(">u2").tobytes()
        (tmp_path / "wide.ppm").write_bytes(b"P6 16 16 65535\n" + values)
        found = pixels(tmp_path / "wide.ppm").astype(int)
        assert np.abs(found - RAMP[..., None]).max() <= 1  # Pillow rounds, and does not cut off

    @pytest.mark.parametrize("plain", [False, True])
    def test_the_maximum_of_a_pgm_is_white(self, tmp_path, plain):
        """Also if no pixel is white."""
        values = RAMP * 4  # at most 1020 of 4095
        data = " ".join(map(str, values.flat)).encode() if plain else values.astype(">u2").tobytes()
        path = tmp_path / "dark.pgm"
        path.write_bytes((b"P2" if plain else b"P5") + b" 16 16 4095\n" + data)
        assert np.abs(pixels(path)[..., 1].astype(int) - (values >> 4)).max() <= 1

    @pytest.mark.parametrize("largest", [4095, 3000])
    def test_a_tiff_may_say_its_largest_value(self, tmp_path, largest):
        path = tmp_path / "dark.tif"
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags.tagtype[341] = 3
        tags[341] = largest
        Image.fromarray(RAMP).save(path, tiffinfo=tags)
        assert np.array_equal(pixels(path)[..., 0], RAMP >> 4)

    def test_a_tiff_of_twelve_bits(self, tmp_path):
        data = bytes([0x03, 0x20, 0x32]) * (SIDE * SIDE // 2)  # twice 50 of 4095
        (tmp_path / "12.tif").write_bytes(tiff(data, bits=12))
        assert (pixels(tmp_path / "12.tif") == 50 >> 4).all()

    def test_white_may_be_zero(self, tmp_path):
        path = tmp_path / "inverted.tif"
        path.write_bytes(tiff((65535 - (RAMP << 8)).astype("<u2").tobytes(), photometric=0))
        assert np.array_equal(pixels(path)[..., 0], RAMP)
        with Image.open(path) as image:
            image.load()
            assert np.array_equal(pixels(image)[..., 0], RAMP)

    def test_integers_of_32_bits_are_read_if_they_have_16(self):
        found = pixels(Image.fromarray(RAMP.astype(np.int32) << 8))
        assert np.array_equal(found[..., 0], RAMP)

    @pytest.mark.parametrize("value", [-5, 70000])
    def test_or_refused_with_their_range(self, value):
        image = Image.fromarray(np.array([[0, value], [3, 4]], np.int32))
        assert_names(refusal(read_image, image), value)

    def test_floating_point_has_no_white(self):
        assert "floating-point" in refusal(read_image, Image.new("F", (20, 20)))
