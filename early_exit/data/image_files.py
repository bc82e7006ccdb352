"""Image files: finding and decoding them, with numpy and Pillow only."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image, ImageOps

from early_exit.data.pixels import as_rgb
from early_exit.errors import UserError


def read_image(source: str | Path | Image.Image) -> Image.Image:
    """An image file, or an image, as RGB, rotated as its EXIF data say.

    Raises UserError for a file that cannot be decoded.
    """
    try:
        if isinstance(source, Image.Image):
            return as_rgb(ImageOps.exif_transpose(source))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as file:
                file.load()
                return as_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # arbitrary bytes can raise anything in a decoder
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, IsADirectoryError):
            reason = "a folder without images"
        raise UserError(
            f"{source} cannot be read as an image ({reason or type(error).__name__})"
        ) from None


def find_images(names: Iterable[str | Path]) -> Iterator[Path]:
    """Yields each file; for a folder, the images below it, in order, or the folder itself if there
    are none."""
    formats = Image.registered_extensions()
    suffixes = {suffix for suffix, kind in formats.items() if kind in Image.OPEN}
    for name in names:
        path = Path(name)
        if not path.is_dir():
            yield path
            continue
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in suffixes and file.is_file()
        ]
        yield from inside or [path]  # which cannot be read, and is reported
