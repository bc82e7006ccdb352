"""Image files: finding them, with Pillow only."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image


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
