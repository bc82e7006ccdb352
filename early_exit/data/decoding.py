"""The one decoder of image files, for training, evaluation and prediction alike.

It needs numpy and Pillow only. The pixels are a function of the file: no setting of Pillow changes
them, and every program reads, and refuses, the same files. Images are decoded one at a time in a
process, because those settings and Python's filters of warnings belong to the whole process;
threads wait for storage at the same time.
"""

import contextlib
import ctypes
import errno
import functools
import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from early_exit.data import rgb
from early_exit.errors import UserError
from early_exit.system.text import in_a_line

log = logging.getLogger(__name__)

MAX_PIXELS = 2**28
"""Of one image, before it is decoded. Cameras and phones take up to 200 million; as RGB this many
take 1 GiB."""
BUFFER = 2**16  # bytes that are read at once; most headers are shorter
# Errors of the machine or of its storage: the next file would have them too.
NOT_THE_FILE = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
)
ORIENTATION = 0x0112  # the tag in EXIF data
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MEANINGLESS = ("Metadata Warning",)  # warnings about tags of TIFF files that hold no pixels

ImageSource = str | Path | bytes | Image.Image
"""The path of an image file, its content, or an image."""

_one_at_a_time = threading.RLock()


def _renew_lock() -> None:
    """In a new process, where another thread of the old one may have held it."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


class Unreadable(UserError):
    """An image that is refused."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{in_a_line(name)} cannot be read as an image ({reason})")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type["Unreadable"], tuple[str, str]]:  # from worker processes
        return Unreadable, (self.name, self.reason)


def read_image(source: ImageSource) -> Image.Image:
    """An image as `decode` gives it. A warning about the file is logged, once."""
    image, notice = decode(source)
    report(_name_of(source), notice)
    return image


def decode(source: ImageSource, max_pixels: int | None = None) -> tuple[Image.Image, str]:
    """The first frame of an image file, or an image, as RGB, rotated as its EXIF data say; and the
    warning about the file, or "".

    max_pixels: by the header; default and maximum: `MAX_PIXELS`. Raises Unreadable for a file that
    cannot be decoded or has more, and OSError for errors that are not the file's (`NOT_THE_FILE`).
    """
    with _opened(source, max_pixels) as (file, notices):
        image = rgb.as_rgb(file)
        turn = TURNS.get(_orientation(file, notices))
        if turn is not None:
            image = image.transpose(turn)
            image.info = {}  # which would have it turned again
        if image is source:
            image = image.copy()
    return image, _joined(notices)


def check_header(source: ImageSource) -> None:
    """Raises Unreadable for a file that is refused because of its header alone."""
    with _opened(source):
        pass


def report(name: str, notice: str) -> None:
    """Logs the warning about a file, if there is one, once."""
    if notice:
        _report(name, notice)


@functools.lru_cache(maxsize=2**16)
def _report(name: str, notice: str) -> None:
    log.warning("%s is used, with a warning: %s", name, notice)


def _name_of(source: ImageSource) -> str:
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"an image of {source.width}x{source.height}")
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    return str(source)


@contextlib.contextmanager
def _opened(
    source: ImageSource, max_pixels: int | None = None
) -> Iterator[tuple[Image.Image, list[str]]]:
    """The image, not yet decoded, and its warnings, which are complete when the context ends.
    Errors are raised as Unreadable."""
    notices: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with contextlib.ExitStack() as stack:
            opened: Any = source
            if isinstance(source, bytes):
                opened = stack.enter_context(io.BytesIO(source))
            elif not isinstance(source, Image.Image):
                opened = stack.enter_context(open(source, "rb", BUFFER))
                opened.peek()  # before other threads wait: storage may be slow
            caught = stack.enter_context(_pillow_at_defaults())
            if opened is not source:
                opened = stack.enter_context(Image.open(opened))
            _check(opened, min(max_pixels or MAX_PIXELS, MAX_PIXELS))
            yield opened, notices
    except Exception as error:  # arbitrary bytes can raise anything in a decoder
        if getattr(error, "errno", None) in NOT_THE_FILE:
            raise
        raise Unreadable(_name_of(source), _reason(error, source, _texts(caught))) from None
    notices += _texts(caught)


def _check(image: Image.Image, max_pixels: int) -> None:
    """Raises ValueError for an image that is not decoded."""
    width, height = image.size
    if not width or not height:
        raise ValueError(f"it has no pixels: {width}x{height}")
    if width * height > max_pixels:
        raise ValueError(_too_many(width * height, max_pixels))
    if getattr(image, "format", None) == "EPS":  # Pillow would run Ghostscript
        raise ValueError("an EPS file is a program, not pixels")
    rgb.check_white(image)


def _too_many(pixels: int, max_pixels: int) -> str:
    return f"it has {pixels:,} pixels, and at most {max_pixels:,} are decoded"


def _orientation(image: Image.Image, notices: list[str]) -> int:
    """The orientation in the EXIF data of a decoded image."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception as error:
        notices.append(f"its EXIF data cannot be read ({_joined([str(error)])})")
        return 1


def _reason(error: Exception, source: ImageSource, warned: list[str]) -> str:
    """Why an image was refused, in one line."""
    text = getattr(error, "strerror", None) or _joined([str(error)]) or type(error).__name__
    match error:
        case IsADirectoryError():
            return "it is a folder; name the files in it"
        case UnidentifiedImageError():
            if not isinstance(source, Image.Image) and not _size(source):
                return "the file is empty"
            return _joined(["its content is of no kind that Pillow decodes", *warned])
        case Image.DecompressionBombError():
            found = re.search(r"\d+", text)
            return _too_many(int(found[0]) if found else MAX_PIXELS + 1, MAX_PIXELS)
        case MemoryError():
            return "there is not enough memory to decode it"
        case OSError() if text.startswith("decoder error"):
            return f"damaged, or compressed in a way that Pillow does not decode ({text})"
    return text


def _size(source: str | Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else os.path.getsize(source)


def _texts(caught: list[warnings.WarningMessage]) -> list[str]:
    texts = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    return [text for text in texts if not text.startswith(MEANINGLESS)]


def _joined(texts: list[str]) -> str:
    return "; ".join(dict.fromkeys(" ".join(text.split()) for text in texts))


@contextlib.contextmanager
def _pillow_at_defaults() -> Iterator[list[warnings.WarningMessage]]:
    """Pillow with the same limits in every program, and without output: its warnings are in the
    list, and libtiff prints no errors, for which Pillow raises its own."""
    tiff_log = logging.getLogger("PIL.TiffImagePlugin")
    with _one_at_a_time, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, tiff_log.disabled
        handler = _set_libtiff_handler()(None)
        # Pillow's error comes at twice this number
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = MAX_PIXELS // 2, False
        tiff_log.disabled = True
        try:
            yield caught
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, tiff_log.disabled = before
            _set_libtiff_handler()(handler)


@functools.cache
def _set_libtiff_handler() -> Callable[[int | None], int | None]:
    """libtiff's function that sets what it does with errors, by default printing them, and returns
    what was set before. Where Pillow hides libtiff, or has none, nothing is set."""
    try:
        setter = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
    except (AttributeError, OSError, TypeError):
        return lambda handler: handler
    setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
    return setter
