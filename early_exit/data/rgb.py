"""From an image of any kind to three channels of bytes, with numpy and Pillow only."""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

BACKGROUND = (255, 255, 255)
"""What is seen through transparent pixels: white, as on a page and in most viewers. Drawings with
transparency are mostly dark, and would vanish on black."""
DEPTHS = (8, 10, 12, 14, 16)  # bits of cameras and scanners
FULL = 2**16 - 1
SWAPPED = {"16L": "16B", "16B": "16L", "16N": "16B" if sys.byteorder == "little" else "16L"}
# Of two bytes per colour Pillow decodes the upper one. The raw mode that decodes the lower byte, by
# the raw mode that decodes the upper one; for LA it decodes all four bytes.
OTHER_BYTE = {
    f"{bands};{order}": f"{bands};{other}"
    for bands in ("RGB", "RGBX", "RGBA")
    for order, other in SWAPPED.items()
} | {"LA;16B": "RGBA"}
BITS_PER_SAMPLE, PHOTOMETRIC, LARGEST_SAMPLE = 258, 262, 341  # tags of TIFF files


@dataclass(frozen=True)
class Stored:
    """How a file stores its pixels; Pillow no longer has this after decoding."""

    kind: str = ""
    """Pillow's raw mode, such as "RGB;16B"; empty if it is not known."""
    white: int = 0
    """The value of white that a PGM or PPM file states; 0 in others."""
    bits: int | None = None
    """Of a grey value, if the file states them."""
    inverted: bool = False
    """Whether 0 is white, which Pillow ignores."""
    file: Any = None
    """Its path, or the open file."""

    @classmethod
    def of(cls, image: Image.Image) -> "Stored":
        """How the file of this image stores them."""
        tiles = getattr(image, "tile", None)
        args = tiles[0][3] if tiles else ""
        kind = (args[0] if isinstance(args, tuple) else args) if args else ""
        kind = kind if isinstance(kind, str) else ""
        file = getattr(image, "filename", "") or getattr(image, "fp", None)
        match getattr(image, "format", None):
            case "PPM" if kind:
                white = args[-1] if isinstance(args, tuple) else FULL if kind == "I;16B" else 255
                # Pillow has scaled grey values of another white to 16 bits
                return cls(kind, white, 16 if white < FULL else None, file=file)
            case "TIFF":
                tags = image.tag_v2  # type: ignore[attr-defined]
                inverted = image.mode == "I;16" and tags.get(PHOTOMETRIC) == 0
                return cls(kind, 0, _tiff_bits(tags), inverted, file)
        return cls(kind, file=file)


def _tiff_bits(tags: Any) -> int | None:
    """The bits of a TIFF file's values, if its tags say that they are fewer than 16."""
    found = [*_numbers(tags.get(BITS_PER_SAMPLE))[:1]]
    found += [number.bit_length() for number in _numbers(tags.get(LARGEST_SAMPLE))[:1]]
    bits = min((number for number in found if number > 0), default=16)
    return max(8, bits) if bits < 16 else None


def _numbers(value: Any) -> tuple[int, ...]:
    """The whole numbers of a tag; none if it has others."""
    values = value if isinstance(value, tuple) else (value,)
    return values if all(isinstance(number, int) for number in values) else ()


def as_rgb(image: Image.Image) -> Image.Image:
    """An image or a file as RGB, on `BACKGROUND` where it is transparent; the image itself if it is
    RGB already.

    Of 16 bits the upper eight are kept. If all values would fit into fewer bits, they are taken to
    have no more: the fewest of `DEPTHS`, or what the file states. Raises ValueError for pixels
    whose white level is unknown.
    """
    stored = Stored.of(image)
    image.load()
    check_white(image)
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        return _from_integers(image, stored, clear)
    bits = 16
    if stored.kind in OTHER_BYTE:
        if _largest_colour(image) < 2 ** (DEPTHS[-2] - 8):
            image, bits = _with_other_byte(image, stored)
        if isinstance(clear, tuple):
            image = _with_clear(image, tuple(value >> (bits - 8) for value in clear))
    elif stored.white == FULL and image.mode == "RGB":
        image = _with_less_white(image, stored)
    elif stored.kind in ("L;2", "L;4") and isinstance(clear, int):
        image = _with_clear(image, clear * 255 // (2 ** int(stored.kind[2:]) - 1))
    if image.has_transparency_data:
        return _on_background(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def check_white(image: Image.Image) -> None:
    """Raises ValueError for floating-point pixels, whose white level is unknown. A file need not be
    decoded for this."""
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers, whose white level is unknown; save it with 8 or"
            " 16 bits"
        )


def _on_background(image: Image.Image) -> Image.Image:
    """An image with transparency on `BACKGROUND`."""
    if image.mode != "RGBA":
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    page = Image.new("RGB", image.size, BACKGROUND)
    page.paste(image, mask=image)
    return page


def _with_clear(image: Image.Image, clear: Any) -> Image.Image:
    """The same image with another value that means transparent."""
    image = image.copy()
    image.info["transparency"] = clear
    return image


def _from_integers(image: Image.Image, stored: Stored, clear: int | None) -> Image.Image:
    """A grey image of integers. clear: the value that means transparent."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > FULL:
        raise ValueError(
            f"its pixels are integers from {low} to {high}, whose white level is unknown; save it"
            " with 8 or 16 bits"
        )
    bits = stored.bits if stored.bits and high < 2**stored.bits else _bits(high)
    grey = _upper_byte(values, bits)
    page = Image.fromarray(255 - grey if stored.inverted else grey).convert("RGB")
    if clear is not None:
        page.paste(BACKGROUND, mask=Image.fromarray(values == clear))
    return page


def _bits(largest: int) -> int:
    """The fewest bits that hold a value."""
    return next(bits for bits in DEPTHS if largest < 2**bits)


def _upper_byte(values: np.ndarray, bits: int) -> np.ndarray:
    """The upper eight of as many bits."""
    found = np.empty(values.shape, np.uint8)
    return np.right_shift(values, bits - 8, out=found, casting="unsafe")


def _largest_colour(image: Image.Image) -> int:
    """The largest value of every channel but alpha."""
    return max(int(image.getextrema()[channel][1]) for channel in range(3))  # type: ignore[index]


def _with_other_byte(image: Image.Image, stored: Stored) -> tuple[Image.Image, int]:
    """A file of two bytes per colour, in which the upper ones are almost 0: the upper eight bits of
    the fewest that hold the values of each channel, and the number of these bits for colours."""
    upper, other = np.asarray(image), np.asarray(_again(stored, OTHER_BYTE[stored.kind]))
    lower = other[..., [1, 1, 1, 3]] if stored.kind.startswith("LA") else other
    values = upper.astype(np.uint16) << 8 | lower
    bits = _bits(int(values[..., :3].max()))
    found = _upper_byte(values, bits)
    if values.shape[2] == 4:
        found[..., 3] = _upper_byte(values[..., 3], _bits(int(values[..., 3].max())))
    brighter = Image.fromarray(found)
    brighter.info = dict(image.info)
    return brighter, bits


def _with_less_white(image: Image.Image, stored: Stored) -> Image.Image:
    """A PPM file that states the largest white: with the white of fewer bits, if that suffices."""
    largest = _largest_colour(image)
    bits = next(bits for bits in DEPTHS if largest <= round((2**bits - 1) * 255 / FULL))
    return image if bits == 16 else _again(stored, "RGB", 2**bits - 1)


def _again(stored: Stored, kind: str, white: int | None = None) -> Image.Image:
    """A file decoded as another kind, or with another white."""
    with Image.open(stored.file) as file:
        file.tile = [tile._replace(args=_replaced(tile.args, kind, white)) for tile in file.tile]
        file.load()
    return file


def _replaced(args: Any, kind: str, white: int | None) -> Any:
    """Arguments of Pillow's decoder."""
    if not isinstance(args, tuple):
        return kind
    return (kind, *args[1:]) if white is None else (kind, white)
