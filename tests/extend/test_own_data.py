"""A user's own data: told apart by their content, and refused if they are not images."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import TASK, few_digits, quick_report, refusal, tiny_run

from early_exit.choosing.record import ExitRecord
from early_exit.config import OptimConfig
from early_exit.data import file_lists
from early_exit.data.in_memory import ImageSet, cut
from early_exit.training import checkpoint


def test_a_split_is_told_apart_by_its_images_and_targets():
    data = few_digits(0)
    part = data.splits["test"]
    images, targets = part.images.clone(), part.targets.clone()
    images[7, 0, 3, 3] += 1
    targets[7] = (targets[7] + 1) % 10
    others = [
        ImageSet(images, part.targets),
        ImageSet(part.images, targets),
        part.subset(np.arange(59)),
    ]
    hashes = {data.digest("test")}
    for other in others:
        splits = {**data.splits, "test": other}
        hashes.add(dataclasses.replace(data, splits=splits).digest("test"))
    assert len(hashes) == 4
    twin = ImageSet(part.images.clone(), part.targets.clone())
    again = dataclasses.replace(data, splits={**data.splits, "test": twin})
    assert again.digest("test") == data.digest("test")
    assert data.digest("val") != data.digest("test")


@pytest.mark.parametrize("split", ["val", "test"])
def test_records_of_images_that_changed_are_made_anew(run_copy, split):
    """Under the same name, of the same number: only their content tells them apart."""
    data = few_digits(0)
    part = data.splits[split]
    noise = torch.randint(
        256, part.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    splits = {**data.splits, split: ImageSet(noise, part.targets)}
    changed = dataclasses.replace(data, splits=splits)
    stored = ExitRecord.load(str(run_copy / "records" / f"{split}-off")).logits
    quick_report(run_copy, dataclasses.replace(TASK, load_data=lambda settings: changed))
    now = ExitRecord.load(run_copy / "records" / f"{split}-off").logits
    # for every image some exit differs: noise changes logits by more than rounding could
    assert (abs(stored - now).max(axis=(1, 2)) > 1e-3 * abs(stored).max()).all()


@pytest.mark.parametrize(
    ("images", "targets"),
    [
        (torch.zeros(4, 3, 8, 8), torch.zeros(4)),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(4)),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(5)),
    ],
)
def test_tensors_that_are_not_images(images, targets):
    message = refusal(ImageSet, images, targets.long())
    assert "uint8" in message and "(N, C, H, W)" in message


@pytest.mark.parametrize("size", [0, 60, 61])
def test_a_val_without_images_and_one_of_all(size):
    part = few_digits(0).splits["test"]
    message = refusal(cut, "some", part, part, list("0123456789"), val_size=size)
    assert "val_size" in message and str(size) in message and "60" in message


def test_classes_and_statistics_of_numpy_can_be_read_back(tmp_path):
    """A checkpoint that holds objects of numpy is refused where it is read."""
    few = few_digits(0)
    train, test = few.splits["train"], few.splits["test"]
    classes, values = np.arange(10), np.float64([0.25, 0.5, 0.75])
    made = cut("numbers", train, test, classes, val_size=12, mean=values, std=values)
    assert made.classes == tuple("0123456789") and made.mean == (0.25, 0.5, 0.75)
    task = dataclasses.replace(TASK, load_data=lambda settings: own)
    own = dataclasses.replace(few, classes=tuple(classes))
    assert "int64" in refusal(tiny_run, tmp_path / "run", task)
    names = tuple(map(np.str_, classes))
    own = dataclasses.replace(few, classes=names, mean=tuple(values), std=tuple(values))
    optim = OptimConfig(epochs=np.int64(1), batch_size=8, lr=np.float64(0.05))
    run = tiny_run(tmp_path / "run", task, optim, head=(np.str_("linear"),))
    state = checkpoint.load(run)
    assert state["classes"] == list("0123456789")
    file_lists.check_same_classes(own, run, range(10))  # as earlier versions stored them
    assert state["normalisation"]["mean"] == [0.25, 0.5, 0.75]
    assert quick_report(run, task)["run"]["settings"]["optim"]["lr"] == 0.05
