"""Resizing and cropping: what torchvision's reference gives, without its memory for thin images."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from early_exit.data import pixels
from early_exit.data.pixels import THIN, as_bytes, centre_crop, fitted


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng((width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference(image: Image.Image, resize: int, crop: int) -> np.ndarray:
    return np.asarray(v2.Compose([v2.Resize(resize), v2.CenterCrop(crop)])(image))


SIZES = [(1, 1), (1, 2), (2, 1), (1, THIN), (THIN * 3, 3), (20, 20), (21, 20), (97, 31), (33, 500)]


class TestCentreCrop:
    @pytest.mark.parametrize("resize, crop", [(20, 16), (16, 16), (20, 1), (1, 1), (33, 20)])
    def test_the_pixels_are_those_of_torchvision(self, resize, crop):
        random = np.random.default_rng(0).integers(1, 150, (40, 2)).tolist()
        for width, height in SIZES + [size for size in random if max(size) <= THIN * min(size)]:
            image = noise(width, height)
            found = np.asarray(centre_crop(image, resize, crop))
            assert np.array_equal(found, reference(image, resize, crop)), (width, height)

    @pytest.mark.parametrize("smooth", [False, True])
    def test_a_thin_image_differs_by_rounding_at_most(self, smooth):
        """Both passes round to bytes, and either may round the other way at a half."""
        rng, different = np.random.default_rng(0), []
        for _ in range(60):
            side = int(rng.integers(1, 30))
            size = [side, int(side * rng.uniform(THIN + 1, 6 * THIN))]
            if rng.random() < 0.5:
                size.reverse()
            image = (
                noise(size[0] // 8 + 1, size[1] // 8 + 1).resize(size) if smooth else noise(*size)
            )
            found = np.asarray(centre_crop(image, 20, 16)).astype(int)
            different.append(np.abs(found - reference(image, 20, 16)))
        assert np.max(different) <= 2
        assert np.mean(different) < 0.25  # of 255

    def test_it_is_exact_where_no_number_is_rounded(self, monkeypatch):
        """As for powers of two: every weight of the filter is then exact."""
        monkeypatch.setattr(pixels, "THIN", 0)  # no image is resized as a whole
        for width, height in ((8, 512), (1024, 4), (64, 64), (16, 4096)):
            image = noise(width, height)
            assert np.array_equal(np.asarray(centre_crop(image, 32, 16)), reference(image, 32, 16))

    @pytest.mark.parametrize("size", [(2, 20_000), (20_000, 2), (1, 100_000), (100_000, 1)])
    def test_a_thin_image_takes_no_memory(self, size, monkeypatch):
        made = []
        resize = Image.Image.resize
        monkeypatch.setattr(
            Image.Image, "resize", lambda *given: made.append(resize(*given)) or made[-1]
        )
        image = Image.new("RGB", size, "red")
        assert centre_crop(image, 256, 224).getcolors() == [(224 * 224, (255, 0, 0))]
        assert [one.size for one in made] == [(224, 224)]


@pytest.mark.parametrize("size", [*SIZES, (2, 20_000), (100_000, 1)])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 24)])
def test_an_image_of_any_size_is_fitted(size, shape):
    image = fitted(Image.new("RGB", size, "white"), shape)
    assert as_bytes(image, shape[0]).shape == shape
    assert (as_bytes(image, shape[0]) == 255).all()
