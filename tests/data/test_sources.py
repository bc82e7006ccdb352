"""Image sources: noise."""

import torch
from helpers import load_folders


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
