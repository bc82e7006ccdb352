"""Class folders: how they are cut into splits, and that the position decides each batch."""

import logging
import re

import pytest
import torch
from helpers import (
    FOLDERS,
    assert_names,
    file_names,
    folder_config,
    load_folders,
    make_folders,
    read_all,
    refusal,
)
from PIL import Image
from torchvision.transforms import v2

from early_exit.data.folders import MEAN, STD, train_transform
from early_exit.data.sources import Files
from early_exit.data.splits import Shard
from early_exit.errors import UserError

# Rounding of a normalised pixel, computed either way in float32: a few operations on values that
# are no larger than 1 / std. The next byte would be 1 / 255 / std away, ten thousand times as far.
ROUNDING = 8 * torch.finfo(torch.float32).eps / min(STD)


@pytest.fixture
def folders(tmp_path):
    """Three classes of 8 train and 4 test images."""
    return make_folders(tmp_path / "set")


class TestCut:
    def test_official_val_is_test_and_val_is_cut_from_train(self, folders):
        loaded = load_folders(folders)
        assert loaded.classes == FOLDERS
        assert {split: loaded.size(split) for split in loaded.splits} == {
            "train": 18,
            "val": 6,
            "test": 12,
        }
        assert set(file_names(loaded, "train")).isdisjoint(file_names(loaded, "val"))
        everything = {str(path) for path in folders.glob("train/*/*")}
        assert {*file_names(loaded, "train"), *file_names(loaded, "val")} == everything
        assert set(file_names(loaded, "test")) == {str(path) for path in folders.glob("val/*/*")}

    def test_the_cut_is_stratified_and_seeded(self, folders):
        first, again, other = (
            load_folders(folders),
            load_folders(folders),
            load_folders(folders, split_seed=1),
        )
        _, targets = read_all(first.eval_batches("val", 4))
        assert torch.bincount(targets).tolist() == [2, 2, 2]
        assert file_names(first, "val") == file_names(again, "val") != file_names(other, "val")
        assert first.val_hash == again.val_hash != other.val_hash

    @pytest.mark.parametrize("asked, size", [(None, 2), (0.25, 6), (5, 5), (5.0, 5)])
    def test_its_size(self, folders, asked, size):
        assert load_folders(folders, val_size=asked).size("val") == size  # absent: a tenth of 24

    @pytest.mark.parametrize("asked", [24, 100, 0.01])
    def test_a_cut_without_train_or_val_images(self, folders, asked):
        assert re.search(r"\b24 images\b", refusal(load_folders, folders, val_size=asked))

    def test_a_class_whose_images_are_all_held_out(self, folders):
        for path in (folders / "train" / "bee").glob("[1-7].JPEG"):
            path.unlink()
        assert load_folders(folders, val_size=2).size("train") == 15
        assert_names(refusal(load_folders, folders, val_size=14), "bee", "--val-size")

    def test_classes_without_a_held_out_image_are_counted(self, folders, caplog):
        caplog.set_level(logging.INFO)
        load_folders(folders)
        assert caplog.messages == []
        load_folders(folders, val_size=2)
        (line,) = caplog.messages
        assert_names(line, "1 of 3", "cat")

    def test_other_files_make_another_hash(self, folders):
        before = load_folders(folders)
        (folders / "train" / "ape" / "7.JPEG").rename(folders / "train" / "ape" / "8.JPEG")
        assert load_folders(folders).val_hash != before.val_hash
        assert load_folders(folders).digest("test") == before.digest("test")

    def test_halves_of_test(self, folders):
        loaded = load_folders(folders)
        chosen, rest = loaded.test_halves(3)
        cut = loaded.cut_test(3)
        assert file_names(cut, "val") == [file_names(loaded, "test")[row] for row in chosen]
        assert file_names(cut, "test") == [file_names(loaded, "test")[row] for row in rest]
        assert cut.val_hash not in (loaded.val_hash, loaded.cut_test(4).val_hash)


class TestImages:
    def test_held_out_images_are_what_torchvision_makes_of_them(self, folders):
        loaded = load_folders(folders)
        images, targets = read_all(loaded.eval_batches("test", 5))
        pipeline = v2.Compose(
            [
                v2.Resize(20),
                v2.CenterCrop(16),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        expected = [
            pipeline(Image.open(name).convert("RGB")) for name in file_names(loaded, "test")
        ]
        torch.testing.assert_close(images, torch.stack(expected), atol=ROUNDING, rtol=0)
        assert targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert images.is_contiguous(memory_format=torch.channels_last)

    def test_a_picture_is_the_image_before_it_is_normalised(self, folders):
        loaded = load_folders(folders)
        shown = torch.from_numpy(loaded.picture("test", 7)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
        images, _ = read_all(loaded.eval_batches("test", 12))
        torch.testing.assert_close((shown - mean) / std, images[7], atol=ROUNDING, rtol=0)

    @pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
    def test_grey_cmyk_and_alpha_load(self, folders, mode):
        path = folders / "val" / "bee" / ("9.tif" if mode == "CMYK" else "9.png")
        Image.new(mode, (40, 30), 1 if mode in "P1" else None).save(path)
        images, targets = read_all(load_folders(folders).eval_batches("test", 13))
        assert images.shape == (13, 3, 16, 16)
        assert torch.bincount(targets).tolist() == [4, 5, 4]

    def test_crops_are_random_and_of_the_training_size(self, folders):
        loaded = load_folders(folders, train_crop=12)
        images, _ = next(loaded.train_batches(6, 0, 0))
        assert images.shape == (6, 3, 12, 12)

    @pytest.mark.parametrize("size", [(1, 1), (1, 3), (300, 1), (2, 20_000), (20_000, 2)])
    def test_an_image_of_any_size_is_augmented(self, folders, size):
        transform = train_transform(folder_config(folders))
        for seed in range(5):
            torch.manual_seed(seed)
            image = transform(Image.new("RGB", size, "white"))
            assert image.getcolors() == [(16 * 16, (255, 255, 255))]


class TestPosition:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("first_step", [1, 2])
    def test_decides_everything(self, folders, workers, first_step):
        loaded = load_folders(folders, workers=workers)
        whole = list(loaded.train_batches(6, 5, 2))
        tail = list(load_folders(folders).train_batches(6, 5, 2, first_step))
        assert len(whole) == 3
        for (images, targets), (same, so) in zip(whole[first_step:], tail, strict=True):
            assert torch.equal(images, same) and torch.equal(targets, so)

    def test_another_epoch_or_seed_is_another_order(self, folders):
        loaded = load_folders(folders)
        first, later, other = (
            read_all(loaded.train_batches(18, *position))[0]
            for position in ((0, 0), (0, 1), (1, 0))
        )
        assert not torch.equal(first, later) and not torch.equal(first, other)

    def test_every_image_once_an_epoch(self, folders):
        loaded, seen = load_folders(folders), []
        image = Files.image

        def noted(self, row, transform):
            seen.append(self.name(row))
            return image(self, row, transform)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Files, "image", noted)
            list(loaded.train_batches(6, 0, 0))
        assert sorted(seen) == sorted(file_names(loaded, "train"))

    def test_torchs_own_random_state_does_not_change(self, folders):
        loaded = load_folders(folders, workers=1)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        list(loaded.train_batches(6, 0, 0))
        list(load_folders(folders).train_batches(6, 0, 0))
        assert torch.equal(before, torch.get_rng_state())

    def test_processes_and_micro_batches_share_a_step(self, folders):
        loaded = load_folders(folders)
        whole, _ = read_all(loaded.train_batches(6, 0, 0))
        micro_batches, _ = read_all(loaded.train_batches(6, 0, 0, shard=Shard(micro_batches=3)))
        ranks = [list(loaded.train_batches(6, 0, 0, shard=Shard(rank, 3))) for rank in range(3)]
        assert torch.equal(whole, micro_batches)
        for step in range(3):
            parts = torch.cat([batches[step][0] for batches in ranks])
            assert torch.equal(parts, whole[6 * step : 6 * step + 6])

    def test_every_held_out_image_is_scored_by_one_process(self, folders):
        loaded = load_folders(folders)
        whole, _ = read_all(loaded.eval_batches("test", 5))
        found = [
            part for rank in range(4) for part, _ in loaded.eval_batches("test", 5, Shard(rank, 4))
        ]
        assert sorted(map(len, found)) == [2, 5, 5]  # and nothing for the fourth process
        assert torch.equal(torch.cat(found), whole)


class TestSettings:
    @pytest.mark.parametrize(
        "settings, named",
        [
            ({"train_crop": 0}, r"data\.train_crop .*\b0\b"),
            ({"flip": "alternating"}, r"data\.flip\b"),
            ({"pad": 2}, r"data\.pad\b"),
            ({"val_crop": 21}, r"data\.val_crop .*\b21\b.*data\.val_resize .*\b20\b"),
            ({"workers": -1}, r"data\.workers .*-1\b"),
            ({"val_size": 0}, r"data\.val_size .*\b0\b"),
            ({"val_size": float("nan")}, r"data\.val_size .*\bnan\b"),
            ({"dummy": 7}, r"data\.dummy .*\b7\b"),
        ],
    )
    def test_refused(self, settings, named):
        with pytest.raises(UserError, match=named):
            folder_config("anywhere", **settings)
