"""Training, evaluation and prediction agree on every image of a folder of odd files."""

import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import FOLDERS, folder_config
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from early_exit.classifier import Classifier
from early_exit.data import folders
from early_exit.data.decoding import Unreadable
from early_exit.data.folders import FolderRun
from early_exit.data.sources import Files
from early_exit.data.workers import ImageKey, UnreadableFile
from imagenet.main import TASK

WIDTH, HEIGHT = 40, 30
REFUSED = {  # by the reason that is given
    "float.tif": "floating-point",
    "signed.tif": "integers from -7",
    "torn.jpg": "truncated",
    "torn.png": "truncated",
    "torn.tif": "",
    "torn.webp": "",
    "empty.jpg": "empty",
    "text.jpg": "",
    "html.png": "",
    "bomb.bmp": "2,500,000,000",
    "program.jpg": "eps",
}


def picture() -> Image.Image:
    """Bright at the top left, so that every turn of it shows."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    channels = [255 - 6 * columns, 255 - 8 * rows, 128 + 3 * (columns - rows)]
    return Image.fromarray(np.dstack(channels).clip(0, 255).astype(np.uint8))


def write_readable(folder: Path) -> None:
    """Images of every kind that is decoded."""
    rgb = picture()
    grey = np.asarray(rgb.convert("L"))
    fading = Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1)))
    for suffix in ("png", "jpg", "bmp", "webp", "tif", "ppm"):
        rgb.save(folder / f"rgb.{suffix}")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        rgb.save(folder / f"turned{orientation}.jpg", exif=exif)
        rgb.save(folder / f"turned{orientation}.png", exif=exif)
        rgb.save(folder / f"turned{orientation}.tif", exif=exif)
        rgb.save(folder / f"turned{orientation}.webp", exif=exif)
    for mode in ("1", "L", "P"):
        rgb.convert(mode).save(folder / f"mode-{mode}.png")
    for mode in ("CMYK", "LAB"):
        rgb.convert(mode).save(folder / f"mode-{mode}.tif")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    alpha = rgb.copy()
    alpha.putalpha(fading)
    for suffix in ("png", "tif", "webp"):
        alpha.save(folder / f"alpha.{suffix}")
    Image.merge("LA", [Image.fromarray(grey), fading]).save(folder / "grey-alpha.png")
    rgb.save(folder / "clear-colour.png", transparency=rgb.getpixel((0, 0)))
    rgb.convert("L").save(folder / "clear-grey.png", transparency=int(grey[0, 0]))
    palette = rgb.quantize(16)
    palette.save(folder / "clear-palette.gif", transparency=3)
    palette.save(folder / "clear-palette.png", transparency=bytes(range(0, 256, 16)))
    for bits in (10, 12, 14, 16):
        wide = Image.fromarray(grey.astype(np.uint16) << (bits - 8))
        for suffix in ("png", "tif", "pgm"):
            wide.save(folder / f"{bits}-bits.{suffix}")
    Image.fromarray(grey.astype(np.int32)).save(folder / "32-bits.tif")
    (folder / "maximum.pgm").write_bytes(b"P2 2 2 1000 0 1 500 1000")
    for suffix in ("gif", "webp", "png", "tif"):
        frames = [rgb.rotate(180), rgb.rotate(90)]
        rgb.save(folder / f"frames.{suffix}", save_all=True, append_images=frames)
    for size in ((1, 1), (1, 3), (2, 5000), (5000, 2), (17, 1)):
        rgb.resize(size).save(folder / f"{size[0]}x{size[1]}.png")
    rgb.save(folder / "profile.jpg", icc_profile=b"no profile")
    rgb.save(folder / "corrupt-exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x07\0")
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n4\nno hexadecimals")
    rgb.save(folder / "corrupt-exif.png", pnginfo=text)
    (folder / "wrong-suffix.png").write_bytes((folder / "rgb.jpg").read_bytes())


def write_refused(folder: Path) -> None:
    """The files of `REFUSED`."""
    rgb = picture()
    for suffix in ("jpg", "png", "tif", "webp"):
        rgb.save(folder / f"torn.{suffix}")
        data = (folder / f"torn.{suffix}").read_bytes()
        (folder / f"torn.{suffix}").write_bytes(data[: len(data) * 2 // 3])
    Image.new("F", (8, 8)).save(folder / "float.tif")
    Image.fromarray(np.full((8, 8), -7, np.int32)).save(folder / "signed.tif")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "html.png").write_text("<html>not found</html>")
    rgb.save(folder / "bomb.bmp")
    data = bytearray((folder / "bomb.bmp").read_bytes())
    data[18:26] = struct.pack("<ii", 50_000, 50_000)
    (folder / "bomb.bmp").write_bytes(data)
    rgb.save(folder / "program.eps")
    (folder / "program.eps").rename(folder / "program.jpg")


@dataclass
class Loaded:
    """What `Classifier.read` needs of a run on class folders."""

    config: FolderRun
    network: object = type("Network", (), {"image_shape": (3, 16, 16)})


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[folders.Data, Classifier]:
    """The folder as the data of a run, and a classifier of that run."""
    root = tmp_path_factory.mktemp("odd")
    for split in ("train", "val"):
        for name in FOLDERS:
            (root / split / name).mkdir(parents=True)
            picture().save(root / split / name / "plain.png")
            if split == "train":  # one for val, one to train on
                picture().save(root / split / name / "another.png")
    write_readable(root / "val" / FOLDERS[0])
    write_refused(root / "val" / FOLDERS[1])
    config = FolderRun(data=folder_config(root, val_size=1, bad_files=len(REFUSED)))
    return folders.load(config.data), Classifier((), None, None, Loaded(config), TASK, None)


def rows(data: folders.Data) -> list[tuple[int, Path]]:
    source = data.images.sources["test"]
    assert isinstance(source, Files)
    return [(row, Path(source.name(row))) for row in range(len(source.names))]


def test_evaluation_and_prediction_have_the_same_pixels(odd):
    data, classifier = odd
    compared = 0
    for row, path in rows(data):
        if path.name in REFUSED:
            continue
        evaluated = data.images[ImageKey("test", row, None)]
        predicted = classifier.read(path)
        assert np.array_equal(predicted, evaluated.image.numpy().transpose(2, 0, 1)), path.name
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:  # Pillow's own
            assert np.array_equal(classifier.read(opened), predicted), path.name
        compared += 1
    assert compared > 70


def test_what_one_refuses_the_others_refuse_for_the_same_reason(odd):
    data, classifier = odd
    refused = {}
    for row, path in rows(data):
        augmented = data.images[ImageKey("test", row, (0, 0))]
        found = data.images[ImageKey("test", row, None)]
        if not isinstance(found, UnreadableFile):
            assert not isinstance(augmented, UnreadableFile), path.name
            continue
        assert augmented == found
        with pytest.raises(Unreadable) as caught:
            classifier.read(path)
        assert (caught.value.name, caught.value.reason) == (str(path), found.reason)
        refused[path.name] = found.reason
    assert refused.keys() == REFUSED.keys()
    for name, reason in REFUSED.items():
        assert reason in refused[name].lower()


def test_a_loader_leaves_the_refused_out(odd):
    data, _ = odd
    assert sum(len(images) for images, _ in data.eval_batches("test", 16)) == (
        data.size("test") - len(REFUSED)
    )


@pytest.mark.parametrize("turned", [f"turned{n}.{s}" for n in range(1, 9) for s in ("jpg", "png")])
def test_what_is_turned_in_its_exif_data_is_turned(odd, turned):
    """The brightest corner of each channel says where the top left has gone."""
    data, classifier = odd
    found = classifier.read(Path(rows(data)[0][1]).parent / turned).astype(int)
    corners = [found[0][y, x] + found[1][y, x] for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))]
    expected = {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[int(turned[6])]
    assert int(np.argmax(corners)) == expected
