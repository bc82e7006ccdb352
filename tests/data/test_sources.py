"""Image sources: class folders and their errors, and noise."""

import pytest
import torch
from helpers import load_folders, make_folders, refusal
from PIL import Image


@pytest.fixture
def folders(tmp_path):
    """Three classes of 8 train and 4 test images."""
    return make_folders(tmp_path / "set")


class TestLayout:
    def test_no_directory(self, tmp_path):
        message = refusal(load_folders, tmp_path / "nothing")
        assert str(tmp_path / "nothing") in message
        assert "train/CLASS" in message and "val/CLASS" in message

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_a_missing_split(self, folders, split):
        (folders / split).rename(folders / "other")
        assert str(folders / split) in refusal(load_folders, folders)

    def test_no_class_folders(self, tmp_path):
        (tmp_path / "train").mkdir()
        assert str(tmp_path / "train") in refusal(load_folders, tmp_path)

    def test_an_empty_class_folder(self, folders):
        for path in (folders / "val" / "cat").iterdir():
            path.rename(path.with_suffix(".txt"))
        assert str(folders / "val" / "cat") in refusal(load_folders, folders)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_classes_that_differ(self, folders, split):
        (folders / split / "dog").mkdir()
        Image.new("RGB", (8, 8)).save(folders / split / "dog" / "0.png")
        message = refusal(load_folders, folders)
        assert f"{folders}/{split}" in message and "dog" in message


def test_noise_needs_no_directory():
    loaded = load_folders("nowhere", dummy=500, val_size=None)
    assert {split: loaded.size(split) for split in loaded.splits} == {
        "train": 450,
        "val": 50,
        "test": 20,
    }
    assert len(loaded.classes) == 1000
    images, _ = next(loaded.train_batches(8, 0, 0))
    again, _ = next(load_folders("nowhere", dummy=500, val_size=None).train_batches(8, 0, 0))
    assert images.shape == (8, 3, 16, 16) and torch.equal(images, again)
    assert images.std() > 0.5
    for split in ("val", "test"):
        held_out, _ = next(load_folders("nowhere", dummy=500, val_crop=18).eval_batches(split, 8))
        assert held_out.shape[1:] == (3, 18, 18)
