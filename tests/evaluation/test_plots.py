"""The plots of an evaluation."""

import numpy as np
import pytest

from early_exit.evaluation import plots
from early_exit.evaluation.report import Picture


def test_a_gallery_of_single_images_can_be_drawn(tmp_path):
    row = [Picture(np.zeros((4, 4, 3), np.uint8), "cat", False, "cat, is dog")]
    plots.gallery([("first", row), ("second", row)], tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
def test_images_that_are_all_as_confused_can_be_drawn(tmp_path):
    plots.confusion(np.zeros(5), np.array([True] * 5), tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000
