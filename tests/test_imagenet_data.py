"""Class folders: what is read, how it is cut, what is refused, and that the position decides."""

import dataclasses
import gc
import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import FOLDERS, make_folders, wait_for
from torchvision.transforms import v2

from early_exit.errors import UserError
from early_exit.splits import Share
from imagenet import data
from imagenet.data import FolderConfig

CPU = torch.device("cpu")
# Rounding of a normalised pixel, computed either way in float32: a few operations on values that
# are no larger than 1 / std. The next byte would be 1 / 255 / std away, ten thousand times as far.
ROUNDING = 8 * torch.finfo(torch.float32).eps / min(data.STD)


@pytest.fixture
def folders(tmp_path):
    return make_folders(tmp_path / "set")


def config(root, **settings):
    sizes = {"train_crop": 16, "val_resize": 20, "val_crop": 16, "val_size": 6, "workers": 0}
    return FolderConfig(dataset="set", root=str(root), **{**sizes, **settings})


def load(root, **settings):
    return data.load(config(root, **settings))


def refusal(root, **settings):
    with pytest.raises(UserError) as error:
        load(root, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def read(batches):
    """All batches, as two tensors."""
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def ignores(pid, signum):
    """Whether a process ignores a signal, by the kernel's mask."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)$", status, re.MULTILINE)
    return int(mask, 16) >> (signum - 1) & 1 == 1


def names(loaded, split):
    source, rows = loaded.splits[split]
    return [loaded.images.sources[source].name(row) for row in rows]


class TestCut:
    def test_official_val_is_test_and_val_is_cut_from_train(self, folders):
        loaded = load(folders)
        assert loaded.classes == FOLDERS
        assert {split: loaded.size(split) for split in loaded.splits} == {
            "train": 18, "val": 6, "test": 12
        }
        assert set(names(loaded, "train")).isdisjoint(names(loaded, "val"))
        everything = {str(path) for path in folders.glob("train/*/*")}
        assert {*names(loaded, "train"), *names(loaded, "val")} == everything
        assert set(names(loaded, "test")) == {str(path) for path in folders.glob("val/*/*")}

    def test_the_cut_is_stratified_and_seeded(self, folders):
        first, again, other = load(folders), load(folders), load(folders, split_seed=1)
        _, targets = read(first.eval_batches("val", 4))
        assert torch.bincount(targets).tolist() == [2, 2, 2]
        assert names(first, "val") == names(again, "val") != names(other, "val")
        assert first.val_hash == again.val_hash != other.val_hash

    @pytest.mark.parametrize("asked, size", [(None, 2), (0.25, 6), (5, 5), (5.0, 5)])
    def test_its_size(self, folders, asked, size):
        assert load(folders, val_size=asked).size("val") == size  # absent: a tenth of 24

    @pytest.mark.parametrize("asked", [24, 100, 0.01])
    def test_a_cut_that_leaves_nothing(self, folders, asked):
        assert re.search(r"\b24 images\b", refusal(folders, val_size=asked))

    def test_other_files_make_another_hash(self, folders):
        before = load(folders)
        (folders / "train" / "ape" / "7.JPEG").rename(folders / "train" / "ape" / "8.JPEG")
        assert load(folders).val_hash != before.val_hash
        assert load(folders).digest("test") == before.digest("test")

    def test_halves_of_test(self, folders):
        loaded = load(folders)
        chosen, rest = loaded.test_halves(3)
        cut = loaded.cut_test(3)
        assert names(cut, "val") == [names(loaded, "test")[row] for row in chosen]
        assert names(cut, "test") == [names(loaded, "test")[row] for row in rest]
        assert cut.val_hash not in (loaded.val_hash, loaded.cut_test(4).val_hash)


class TestImages:
    def test_held_out_images_are_what_torchvision_makes_of_them(self, folders):
        loaded = load(folders)
        images, targets = read(loaded.eval_batches("test", 5))
        pipeline = v2.Compose([
            v2.Resize(20), v2.CenterCrop(16), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.MEAN, data.STD),
        ])
        expected = [pipeline(Image.open(name).convert("RGB")) for name in names(loaded, "test")]
        torch.testing.assert_close(images, torch.stack(expected), atol=ROUNDING, rtol=0)
        assert targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert images.is_contiguous(memory_format=torch.channels_last)

    def test_a_picture_is_the_image_before_it_is_normalised(self, folders):
        loaded = load(folders)
        shown = torch.from_numpy(loaded.picture("test", 7)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (data.MEAN, data.STD))
        images, _ = read(loaded.eval_batches("test", 12))
        torch.testing.assert_close((shown - mean) / std, images[7], atol=ROUNDING, rtol=0)

    @pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
    def test_grey_cmyk_and_alpha_load(self, folders, mode):
        path = folders / "val" / "bee" / ("9.tif" if mode == "CMYK" else "9.png")
        Image.new(mode, (40, 30), 1 if mode in "P1" else None).save(path)
        images, targets = read(load(folders).eval_batches("test", 13))
        assert images.shape == (13, 3, 16, 16)
        assert torch.bincount(targets).tolist() == [4, 5, 4]

    def test_crops_are_random_and_of_the_training_size(self, folders):
        loaded = load(folders, train_crop=12)
        images, _ = next(loaded.train_batches(6, 0, 0))
        assert images.shape == (6, 3, 12, 12)


class TestPosition:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("first_step", [1, 2])
    def test_decides_everything(self, folders, workers, first_step):
        loaded = load(folders, workers=workers)
        whole = list(loaded.train_batches(6, 5, 2))
        tail = list(load(folders).train_batches(6, 5, 2, first_step))
        assert len(whole) == 3
        for (images, targets), (same, so) in zip(whole[first_step:], tail, strict=True):
            assert torch.equal(images, same) and torch.equal(targets, so)

    def test_another_epoch_or_seed_is_another_order(self, folders):
        loaded = load(folders)
        first, later, other = (
            read(loaded.train_batches(18, *position))[0] for position in ((0, 0), (0, 1), (1, 0))
        )
        assert not torch.equal(first, later) and not torch.equal(first, other)

    def test_every_image_once_an_epoch(self, folders):
        loaded, seen = load(folders), []
        image = data.Files.image

        def noted(self, row, transform):
            seen.append(self.name(row))
            return image(self, row, transform)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data.Files, "image", noted)
            list(loaded.train_batches(6, 0, 0))
        assert sorted(seen) == sorted(names(loaded, "train"))

    def test_torchs_own_random_state_is_left_alone(self, folders):
        loaded = load(folders, workers=1)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        list(loaded.train_batches(6, 0, 0))
        list(load(folders).train_batches(6, 0, 0))
        assert torch.equal(before, torch.get_rng_state())

    def test_processes_and_goes_share_a_step(self, folders):
        loaded = load(folders)
        whole, _ = read(loaded.train_batches(6, 0, 0))
        goes, _ = read(loaded.train_batches(6, 0, 0, share=Share(goes=3)))
        ranks = [list(loaded.train_batches(6, 0, 0, share=Share(rank, 3))) for rank in range(3)]
        assert torch.equal(whole, goes)
        for step in range(3):
            parts = torch.cat([batches[step][0] for batches in ranks])
            assert torch.equal(parts, whole[6 * step : 6 * step + 6])

    def test_every_held_out_image_is_scored_by_one_process(self, folders):
        loaded = load(folders)
        whole, _ = read(loaded.eval_batches("test", 5))
        found = [
            part for rank in range(4) for part, _ in loaded.eval_batches("test", 5, Share(rank, 4))
        ]
        assert sorted(map(len, found)) == [2, 5, 5]  # and nothing for the fourth process
        assert torch.equal(torch.cat(found), whole)


class TestWorkers:
    def test_the_same_processes_serve_every_split_and_epoch(self, folders):
        loaded = load(folders, workers=2)
        list(loaded.train_batches(6, 0, 0))
        first = [worker.pid for worker in loaded.pool._loader._iterator._workers]
        list(loaded.eval_batches("val", 4))
        next(loaded.eval_batches("test", 4))  # and what is not read to its end
        assert len(read(loaded.train_batches(6, 0, 1))[0]) == 18
        assert [worker.pid for worker in loaded.pool._loader._iterator._workers] == first

    def test_they_leave_with_their_data(self, folders):
        loaded = load(folders, workers=2)
        next(loaded.train_batches(2, 0, 0))  # some of the keys have not been asked for
        workers = loaded.pool._loader._iterator._workers
        gc.disable()  # a circle of references would be found too late
        del loaded
        gc.enable()
        assert [worker.exitcode for worker in workers] == [0, 0]  # told to, not killed

    def test_a_signal_to_all_processes_does_not_end_them(self, folders):
        loaded = load(folders, workers=2)
        batches = loaded.train_batches(3, 0, 0)
        next(batches)
        workers = loaded.pool._loader._iterator._workers
        for worker in workers:
            for signum in (signal.SIGTERM, signal.SIGINT):
                # a signal that is ignored is gone once it was sent, there is nothing to wait for
                wait_for(partial(ignores, worker.pid, signum), "a worker that ignores it")
                os.kill(worker.pid, signum)
        assert len(list(batches)) == 5
        assert all(worker.is_alive() for worker in workers)


class TestBadFiles:
    @pytest.fixture(params=["empty", "torn", "text", "gone"])
    def bad(self, folders, request):
        loaded = load(folders)  # so that a file may go after it was listed
        path = Path(names(loaded, "train")[4])
        if request.param == "gone":
            path.unlink()
        else:
            whole = path.read_bytes()
            contents = {"empty": b"", "torn": whole[:300], "text": b"no image"}
            path.write_bytes(contents[request.param])
        return loaded, path

    @pytest.mark.parametrize("workers", [0, 2])
    def test_stops_the_run_with_one_line(self, bad, workers):
        loaded, path = bad
        loaded = dataclasses.replace(loaded, workers=workers)
        with pytest.raises(UserError, match=f"{path}.*--bad-files"):
            list(loaded.train_batches(6, 0, 0))

    def test_or_is_named_once_and_another_is_there_twice(self, bad, caplog):
        loaded, path = bad
        loaded = dataclasses.replace(loaded, bad_files=1)
        for epoch in range(2):
            images, _ = read(loaded.train_batches(6, 0, epoch))
            assert len(images) == 18
        assert sum(str(path) in message for message in caplog.messages) == 1

    def test_the_limit_is_one_of_files(self, bad):
        loaded, path = bad
        other = Path(names(loaded, "train")[7])
        other.write_bytes(b"")
        with pytest.raises(UserError, match=" 1 .*--bad-files"):
            list(dataclasses.replace(loaded, bad_files=1).train_batches(6, 0, 0))
        assert len(list(dataclasses.replace(loaded, bad_files=2).train_batches(6, 0, 0))) == 3

    def test_held_out_images_are_missing(self, folders):
        loaded = load(folders, bad_files=3)
        Path(names(loaded, "test")[1]).write_bytes(b"")
        images, targets = read(loaded.eval_batches("test", 5))
        assert len(images) == 11
        assert targets.tolist() == [0] * 3 + [1] * 4 + [2] * 4

    def test_a_whole_batch_of_them(self, folders):
        loaded = load(folders, bad_files=3)
        for name in [*names(loaded, "test")[:2], names(loaded, "train")[0]]:
            Path(name).write_bytes(b"")
        assert len(read(loaded.eval_batches("test", 2))[0]) == 10
        with pytest.raises(UserError, match=names(loaded, "train")[0]):
            list(loaded.train_batches(1, 0, 0))


class TestLayout:
    def test_no_directory(self, tmp_path):
        said = refusal(tmp_path / "nothing")
        assert str(tmp_path / "nothing") in said
        assert "train/CLASS" in said and "val/CLASS" in said and "--dummy" in said

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_a_missing_split(self, folders, split):
        (folders / split).rename(folders / "other")
        assert str(folders / split) in refusal(folders)

    def test_no_class_folders(self, tmp_path):
        (tmp_path / "train").mkdir()
        assert str(tmp_path / "train") in refusal(tmp_path)

    def test_an_empty_class_folder(self, folders):
        for path in (folders / "val" / "cat").iterdir():
            path.rename(path.with_suffix(".txt"))
        assert str(folders / "val" / "cat") in refusal(folders)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_classes_that_differ(self, folders, split):
        (folders / split / "dog").mkdir()
        Image.new("RGB", (8, 8)).save(folders / split / "dog" / "0.png")
        said = refusal(folders)
        assert f"{folders}/{split}" in said and "dog" in said


class TestSettings:
    @pytest.mark.parametrize(
        "settings, named",
        [
            ({"train_crop": 0}, r"data\.train_crop .*\b0\b"),
            ({"val_crop": 21}, r"data\.val_crop .*\b21\b.*data\.val_resize .*\b20\b"),
            ({"workers": -1}, r"data\.workers .*-1\b"),
            ({"val_size": 0}, r"data\.val_size .*\b0\b"),
            ({"val_size": float("nan")}, r"data\.val_size .*\bnan\b"),
            ({"dummy": 7}, r"data\.dummy .*\b7\b"),
        ],
    )
    def test_refused(self, settings, named):
        with pytest.raises(UserError, match=named):
            config("anywhere", **settings)

    def test_noise_needs_no_directory(self):
        loaded = load("nowhere", dummy=500, val_size=None)
        assert {split: loaded.size(split) for split in loaded.splits} == {
            "train": 450, "val": 50, "test": 20
        }
        assert len(loaded.classes) == 1000
        images, _ = next(loaded.train_batches(8, 0, 0))
        again, _ = next(load("nowhere", dummy=500, val_size=None).train_batches(8, 0, 0))
        assert images.shape == (8, 3, 16, 16) and torch.equal(images, again)
        assert images.std() > 0.5
        for split in ("val", "test"):
            held_out, _ = next(load("nowhere", dummy=500, val_crop=18).eval_batches(split, 8))
            assert held_out.shape[1:] == (3, 18, 18)
