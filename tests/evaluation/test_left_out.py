"""A run with unreadable held-out files: what its training accepts, its evaluation accepts, leaves
out and names; and a file that is repaired, removed or added later."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    assert_close,
    assert_names,
    bound,
    file_names,
    folder_config,
    load_folders,
    make_folders,
    quick_report,
    refusal,
    tiny_network,
)
from PIL import Image

from early_exit import config as configs
from early_exit.choosing.goals import MaxDrop
from early_exit.config import ModelConfig, OptimConfig, RunConfig
from early_exit.data import file_lists, folders
from early_exit.data.folders import FolderRun
from early_exit.data.sources import Files
from early_exit.evaluation import runtimes
from early_exit.evaluation.evaluate import Options, choose_and_apply
from early_exit.evaluation.rows import galleries
from early_exit.system.distributed import Group
from early_exit.task import Task
from early_exit.trained import get_record, get_splits, load_run
from early_exit.training import checkpoint
from early_exit.training.score import score
from early_exit.training.state import find_resumed
from early_exit.training.train import train

TASK = Task(tiny_network, folders.load, FolderRun, name="folders")
ODD = os.fsdecode(b"\xff\n3.JPEG")
ALLOWED = {"bad_files": 3}


def folder_run(root: Path, directory: Path, epochs: int = 1, **options) -> Path:
    """A run of one early exit on what `make_folders` made. options: of the data, resume, check."""
    called = {name: options.pop(name) for name in ("resume", "check") if name in options}
    config = FolderRun(
        data=folder_config(root, **options),
        model=ModelConfig(exits=("layer1",)),
        optim=OptimConfig(epochs=epochs, batch_size=6, lr=0.05),
        run=RunConfig(amp="off", device="cpu", threads=1),
    )
    return train(config, TASK, runs=directory, run_dir=directory, **called)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`set` with a torn file in val and two bad ones in test, one of an odd name, and a `run` that
    was trained with --bad-files 3. Not to be changed."""
    root = tmp_path_factory.mktemp("bad")
    data = load_folders(make_folders(root / "set", 8, 8))
    torn = Path(file_names(data, "val")[1])
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(torn)
    torn.write_bytes(torn.read_bytes()[:-500])
    Image.open(torn).close()  # its header is whole
    (root / "set" / "val" / "bee" / "3.JPEG").rename(root / "set" / "val" / "bee" / ODD)
    (root / "set" / "val" / "bee" / ODD).write_bytes(b"")
    (root / "set" / "val" / "ape" / "0.JPEG").write_bytes(b"no image")
    folder_run(root / "set", root / "run", **ALLOWED)
    return root


@pytest.fixture
def here(made, tmp_path) -> Path:
    """A copy of `made`, to be changed."""
    return shutil.copytree(made, tmp_path / "copy")


def loaded(here: Path, **data):
    overrides = {**CPU, "data": {"root": str(here / "set"), **data}}
    return load_run(here / "run", TASK, overrides)


def report_of(here: Path, **options):
    data = {"root": str(here / "set"), **options.pop("data", {})}
    return quick_report(here / "run", TASK, overrides={**CPU, "data": data}, **options)


CHAIN = 8 * 64 * 9  # convolutions of the network, and the terms of the longest


def test_records_name_what_they_leave_out_and_have_every_other_image_in_order(here):
    trained = loaded(here)
    splits = get_splits(trained, "train", 0)
    (torn,) = splits.val.info.left_out_names
    assert torn == str(Path(file_names(trained.data, "val")[1]).relative_to(here / "set"))
    assert splits.val.info.left_out == (1,)
    assert splits.test.info.left_out_names == ("val/ape/0.JPEG", r"val/bee/\xff\n3.JPEG")
    assert splits.left_out == (torn, *splits.test.info.left_out_names)
    for split, record in (("val", splits.val), ("test", splits.test)):
        count = trained.data.size(split) - len(record.info.left_out)
        assert len(record) == len(record.logits) == splits.data.size(split) == count
        stored = np.load(here / "run" / "records" / f"{split}-off" / "logits.npy")
        assert len(stored) == count
        logits, targets = [], []
        for images, target in splits.data.eval_batches(split, 128):
            with torch.no_grad():
                logits.append(torch.stack(trained.network(images), dim=1))
            targets.append(target)
        assert np.array_equal(record.targets, torch.cat(targets).numpy())
        found, expected = torch.from_numpy(record.logits), torch.cat(logits)
        assert_close(found, expected, terms=CHAIN)
        # no two images are as near to each other: another order would be seen
        apart = (expected[:, None] - expected[None]).abs().amax(dim=(2, 3)).fill_diagonal_(9e9)
        assert apart.min() > 2 * bound(torch.float32, CHAIN) * expected.abs().max()


def test_the_fastest_runtime_is_found_with_images_that_can_be_read(here, monkeypatch):
    monkeypatch.setattr(runtimes, "available_runtimes", lambda device: ["torch"])
    trained = loaded(here, bad_files=4)
    Path(file_names(trained.data, "val")[0]).write_bytes(b"")
    assert runtimes.fastest(trained, 1) == "torch"


def test_images_that_are_prepared_otherwise_are_recorded_again(here):
    stored = get_splits(loaded(here), "train", 0).val
    settings = loaded(here).config.data
    other = get_splits(loaded(here, val_resize=settings.val_resize + 4), "train", 0).val
    assert other.info.preparation != stored.info.preparation
    assert get_splits(loaded(here), "train", 0).val.info == stored.info


def test_pictures_and_halves_index_the_images_that_were_recorded(here):
    trained = loaded(here)
    for val_from in ("train", "test"):
        splits = get_splits(trained, val_from, 1)
        for split, record in (("val", splits.val), ("test", splits.test)):
            assert splits.data.size(split) == len(record)
            # the colour of an image tells its class, in every split
            shown = [
                splits.data.picture(split, i).mean((0, 1)).argmax() for i in range(len(record))
            ]
            assert shown == record.targets.tolist()
    assert len(splits.val) + len(splits.test) == 22


def test_a_whole_evaluation(here):
    report = report_of(here, live=True, batch_sizes=(1, 4), timing_images=4)
    choice = report["choice"]
    assert (choice["val_images"], choice["test_images"]) == (5, 22)
    assert len(choice["left_out"]) == 3 and report["live"]["images"] == 22
    assert report["live"]["differing_beyond_rounding"] == 0
    text = next((here / "run" / "eval").glob("*/report.md")).read_text()
    assert_names(text, "3 images are left out", "val/ape/0.JPEG")


def test_halves_of_test_are_cut_repeatedly(here):
    report = report_of(here, val_from="test", cuts=2)
    choice = report["choice"]
    assert choice["val_images"] + choice["test_images"] == 22 and report["cuts"]["count"] == 2
    assert choice["left_out"] == ["val/ape/0.JPEG", r"val/bee/\xff\n3.JPEG"]


@pytest.mark.slow
def test_galleries_show_them(here):
    evaluated = choose_and_apply(loaded(here), MaxDrop(0.01), Options())
    rows = galleries(evaluated.test, evaluated.splits)["gallery"]
    for picture in (picture for _, pictures in rows for picture in pictures):
        target = evaluated.splits.data.classes[int(picture.pixels.mean((0, 1)).argmax())]
        assert f"target {target}" in picture.words


def test_a_file_damaged_after_it_was_recorded_is_left_out_of_live_inference(here):
    report_of(here)
    (here / "set" / "val" / "cat" / "1.JPEG").write_bytes(b"")
    live = report_of(here, live=True, batch_sizes=(1,), timing_images=1)["live"]
    assert live["images"] == 21 and live["differing_beyond_rounding"] == 0


@pytest.mark.parametrize("recorded", [False, True])
def test_evaluation_takes_another_number_of_bad_files(here, recorded):
    if recorded:
        report_of(here)
    message = refusal(report_of, here, data={"bad_files": 1})
    assert_names(message, r"\xff\n3.JPEG", "--bad-files")


def test_another_image_under_the_same_name_is_recorded(here, caplog):
    caplog.set_level(logging.INFO)
    splits = get_splits(loaded(here), "train", 0)
    changed = here / "set" / "val" / "cat" / "1.JPEG"
    time = changed.stat().st_mtime + 1
    shutil.copy(here / "set" / "val" / "bee" / "5.JPEG", changed)
    os.utime(changed, (time, time))  # its size may be the same
    caplog.clear()
    again = get_splits(loaded(here), "train", 0)
    assert sum("cat/1.JPEG" in message for message in caplog.messages) == 1
    differ = (np.array(again.test.logits) != np.array(splits.test.logits)).any(axis=(1, 2))
    assert differ.sum() == 1
    assert again.val.info == splits.val.info


def test_a_repaired_file_is_recorded(here, caplog):
    caplog.set_level(logging.INFO)
    report_of(here)
    shutil.copy(here / "set" / "val" / "ape" / "1.JPEG", here / "set" / "val" / "ape" / "0.JPEG")
    choice = report_of(here)["choice"]
    assert choice["test_images"] == 23 and len(choice["left_out"]) == 2
    assert any(
        "val/ape/0.JPEG" in message and "can be read" in message for message in caplog.messages
    )


def test_removed_files_are_told_by_name_and_left_out(here, caplog):
    caplog.set_level(logging.INFO)
    report_of(here)
    torn = here / "set" / get_splits(loaded(here), "train", 0).left_out[0]
    for path in (torn, here / "set" / "val" / "ape" / "0.JPEG"):
        path.unlink()
    caplog.clear()
    choice = report_of(here)["choice"]
    assert (choice["val_images"], choice["test_images"]) == (5, 22)
    assert choice["left_out"] == [f"train/{torn.parent.name}/{torn.name}", r"val/bee/\xff\n3.JPEG"]
    for name in (f"{torn.parent.name}/{torn.name}", "ape/0.JPEG"):
        assert any(f"1 is gone ({name})" in message for message in caplog.messages)
    message = refusal(report_of, here, data={"bad_files": 0})
    assert_names(message, "1 is gone", torn.name, "--bad-files")


def test_other_files_of_train_change_no_record(here, caplog):
    report = report_of(here)
    before = (here / "run" / "records" / "val-off" / "logits.npy").stat()
    train_file = file_names(loaded(here).data, "train")[0]
    shutil.copy(train_file, Path(train_file).with_name("new.JPEG"))
    Path(train_file).unlink()
    caplog.set_level(logging.INFO)
    assert report_of(here)["test"] == report["test"]
    after = (here / "run" / "records" / "val-off" / "logits.npy").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert any("1 is gone" in message and "1 is new" in message for message in caplog.messages)


def test_the_val_that_is_scored_is_the_one_held_out(here):
    def images() -> int:
        path, saved = find_resumed(str(here / "run"), None)
        config = configs.build(FolderRun, configs.merge(saved["config"], {"data": data}))
        return score(config, TASK, "val", path, saved, Group())[1].images

    data = {"root": str(here / "set")}
    before = images()
    for number in range(20):  # a new val would be larger
        ape = here / "set" / "train" / "ape"
        shutil.copy(ape / "1.JPEG", ape / f"new{number}.JPEG")
    assert images() == before > 0


def test_a_run_that_does_not_remember_its_files_is_evaluated(here):
    (here / "run" / file_lists.NAME).unlink()
    report_of(here)
    removed = Path(file_names(loaded(here).data, "train")[0])
    removed.unlink()
    now = load_folders(here / "set").val_hash
    message = refusal(report_of, here)
    assert_names(message, now, checkpoint.load(here / "run")["val_hash"], "--val-from test")
    removed.touch()  # as the message says
    report_of(here)


def test_val_is_not_needed_if_it_is_cut_from_test(here):
    for name in file_names(loaded(here).data, "val"):
        Path(name).unlink()
    assert_names(refusal(report_of, here), "6 are gone", "--val-from test")
    assert report_of(here, val_from="test")["choice"]["val_images"] == 11


def test_other_classes_are_refused(here):
    for split in ("train", "val"):
        (here / "set" / split / "ape").rename(here / "set" / split / "ant")
    for val_from in ("train", "test"):
        assert_names(refusal(report_of, here, val_from=val_from), "ape, bee, cat", "ant, bee, cat")


@pytest.mark.slow
def test_records_of_an_older_version_are_used(here):
    """Their info.json does not say what they leave out: nothing."""
    for name in ("ape/0.JPEG", f"bee/{ODD}"):
        shutil.copy(here / "set" / "val" / "ape" / "1.JPEG", here / "set" / "val" / name)
    record = here / "run" / "records" / "test-off"
    get_record(loaded(here), "test")
    values = json.loads((record / "info.json").read_text())
    assert values.pop("left_out") == values.pop("left_out_names") == []
    (record / "info.json").write_text(json.dumps(values))
    before = (record / "logits.npy").stat().st_ino
    assert len(get_record(loaded(here), "test")) == 24
    assert (record / "logits.npy").stat().st_ino == before


class TestBeforeTheFirstEpoch:
    @pytest.fixture
    def data(self, tmp_path) -> Path:
        """A test file has no header, and no training reads it."""
        root = make_folders(tmp_path / "set")
        (root / "val" / "cat" / "2.JPEG").write_bytes(b"")
        return root

    @pytest.mark.parametrize("check", [True, False])
    def test_headers_are_read(self, data, tmp_path, check):
        message = refusal(folder_run, data, tmp_path / "run", check=check)
        assert_names(message, data / "val" / "cat" / "2.JPEG", "--bad-files")
        assert not (tmp_path / "run" / checkpoint.NAME).exists()

    def test_within_what_is_allowed_it_trains(self, data, tmp_path):
        run = folder_run(data, tmp_path / "run", bad_files=1)
        assert (run / checkpoint.NAME).exists()

    def test_unless_it_is_switched_off(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(Files, "read_header", lambda *_: pytest.fail("read a header"))
        assert (folder_run(data, tmp_path / "run", check_files=False) / checkpoint.NAME).exists()


def test_a_run_resumes_after_its_bad_file_was_removed(tmp_path):
    """Removing it is what the message of the run that stopped tells to do."""
    root = make_folders(tmp_path / "set")
    run = folder_run(root, tmp_path / "run", epochs=2)
    state = checkpoint.load(run)
    checkpoint.save(run, {**state, "position": {"phase": 0, "epoch": 1, "step": 0}})
    Path(file_names(load_folders(root), "train")[3]).unlink()
    folder_run(root, run, epochs=2, resume="auto")
    saved = checkpoint.load(run)
    assert saved["position"]["phase"] == 1 and saved["val_hash"] == state["val_hash"]
    held_out = Path(file_names(load_run(run, TASK, CPU).data, "val")[0])
    checkpoint.save(run, {**state, "position": {"phase": 0, "epoch": 1, "step": 0}})
    held_out.unlink()
    message = refusal(folder_run, root, run, epochs=2, resume="auto")
    assert_names(message, "1 is gone", held_out.name, "--bad-files")
