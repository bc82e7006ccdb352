"""Images in memory: normalisation, augmentation, batches and halves of test."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import assert_names, refusal

from cifar10 import data
from cifar10.data import Data, ImageSet
from early_exit.data import in_memory
from early_exit.data.in_memory import cut


@pytest.fixture(scope="module")
def digits() -> Data:
    """scikit-learn's digits, cut by the default split seed."""
    return data.load("digits")


def numbered(count: int, test_targets: list[int] | None = None) -> Data:
    """Data whose i'th train image is grey of brightness i, normalised to itself; two classes."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    train = ImageSet(images.contiguous(), torch.arange(count) % 2)
    targets = torch.tensor(test_targets or [0, 1])
    test = ImageSet(torch.zeros(len(targets), 3, 32, 32, dtype=torch.uint8), targets)
    splits = {"train": train, "val": test, "test": test}
    return Data("numbered", ("even", "odd"), splits, "hash", (0.0,) * 3, (1 / 255,) * 3, flip=True)


def numbers(images: torch.Tensor) -> list[int]:
    """Which images of `numbered` a batch holds: the middle survives every crop."""
    return images[:, 0, 16, 16].round().int().tolist()


class TestNormalise:
    def test_by_hand(self):
        images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
        mean, std = (0.5, 0.25, 0.2), (0.5, 0.125, 0.4)
        found = dataclasses.replace(numbered(2), mean=mean, std=std).normalise(images)
        # (0 - .5) / .5, (128/255 - .25) / .125, (1 - .2) / .4
        expected = torch.tensor([-1.0, 2.015686, 2.0]).view(1, 3, 1, 1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def test_the_bytes_do_not_change(self):
        images = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
        numbered(2).normalise(images)
        assert bool((images == 7).all())

    def test_channels_last(self):
        images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        found = numbered(2).normalise(images)
        assert found.is_contiguous(memory_format=torch.channels_last)

    def test_a_checkpoints_statistics_replace_the_sets(self):
        found = numbered(2).normalised_by({"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]})
        assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))

    def test_without_a_checkpoints_they_stay(self):
        whole = numbered(2)
        assert whole.normalised_by(None) is whole


def coordinates(count: int) -> torch.Tensor:
    """The same image `count` times: red is the row, green the column, both from 1 on."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0] = torch.arange(1, 33).view(-1, 1)
    image[1] = torch.arange(1, 33).view(1, -1)
    return image.repeat(count, 1, 1, 1)


def crop_and_flip(image: np.ndarray, top: int, left: int, flipped: bool) -> np.ndarray:
    """One image (3, 32, 32), the obvious way."""
    padded = np.zeros((3, 40, 40), np.uint8)
    padded[:, 4:36, 4:36] = image
    crop = padded[:, top : top + 32, left : left + 32]
    return crop[:, :, ::-1] if flipped else crop


def augmented(images: torch.Tensor, seed: int, flip: bool) -> torch.Tensor:
    """`images` after draws of that seed."""
    draws = in_memory.Augmentation.draw(
        len(images), in_memory.PAD, torch.Generator().manual_seed(seed)
    )
    return in_memory.augment(images, draws, in_memory.PAD, flip)


@pytest.fixture(scope="module")
def many() -> torch.Tensor:
    """`coordinates`, augmented 16,200 times: 200 for each of 9 x 9 offsets."""
    return augmented(coordinates(16_200), 2, True)


class TestAugment:
    @pytest.mark.parametrize("flip", [True, False])
    def test_equals_cropping_and_flipping_one_image_after_the_other(self, flip):
        images = torch.randint(
            0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        found = augmented(images, 1, flip)
        draws = torch.Generator().manual_seed(1)
        tops, lefts = torch.randint(0, 9, (2, 50), generator=draws).tolist()
        flipped = (torch.rand(50, generator=draws) < 0.5).tolist()
        assert any(flipped) and not all(flipped)
        for index in range(50):
            expected = crop_and_flip(
                images[index].numpy(), tops[index], lefts[index], flip and flipped[index]
            )
            assert np.array_equal(found[index].numpy(), expected), index

    def test_every_offset_is_equally_likely(self, many):
        flipped = many[:, 1, 16, 15] > many[:, 1, 16, 16]
        row = many[:, 0, 16, 16].long() - 13  # row 16 of a crop is row 12 + top, counted from 1
        column = torch.where(flipped, many[:, 1, 16, 15], many[:, 1, 16, 16]).long() - 13
        counts = torch.bincount(9 * row + column, minlength=81)
        assert len(counts) == 81
        assert counts.min() > 0
        # chi square of 80 degrees of freedom: mean 80, deviation 12.6
        assert ((counts - 200.0) ** 2 / 200).sum() < 80 + 5 * 12.6

    def test_half_are_flipped(self, many):
        flipped = (many[:, 1, 16, 15] > many[:, 1, 16, 16]).sum()
        assert abs(int(flipped) - 8100) < 5 * 63.6  # deviation sqrt(16200) / 2

    def test_flips_do_not_depend_on_the_offset(self, many):
        flipped = many[:, 1, 16, 15] > many[:, 1, 16, 16]
        low = many[:, 0, 16, 16] < 17  # the upper four of nine rows, 7200 expected
        share = flipped[low].double().mean()
        assert abs(float(share) - 0.5) < 5 * 0.5 / 7000**0.5

    def test_without_flip_nothing_is_flipped(self):
        found = augmented(coordinates(500), 2, False)
        assert bool((found[:, 1, 16, 15] < found[:, 1, 16, 16]).all())

    def test_the_originals_do_not_change(self):
        images = coordinates(10)
        augmented(images, 0, True)
        assert torch.equal(images, coordinates(10))


class TestBatches:
    @pytest.mark.parametrize("first_step", range(6))
    def test_a_resumed_epoch_is_the_tail_of_the_whole(self, first_step):
        train = numbered(50)
        whole = list(train.train_batches(8, seed=3, epoch=2))
        tail = list(train.train_batches(8, seed=3, epoch=2, first_step=first_step))
        assert len(tail) == 6 - first_step
        for (images, targets), (wanted, labels) in zip(tail, whole[first_step:], strict=True):
            assert torch.equal(images, wanted)
            assert torch.equal(targets, labels)

    def test_every_image_comes_at_most_once_an_epoch(self):
        seen = [
            number
            for images, _ in numbered(50).train_batches(8, 0, 0)
            for number in numbers(images)
        ]
        assert len(seen) == 48 == len(set(seen))
        assert set(seen) <= set(range(50))

    def test_targets_belong_to_their_images(self):
        for images, targets in numbered(50).train_batches(8, 0, 0):
            assert [number % 2 for number in numbers(images)] == targets.tolist()

    @pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}])
    def test_order_differs_by_epoch_and_by_seed(self, other):
        def order(seed=0, epoch=0):
            batches = numbered(50).train_batches(8, seed, epoch)
            return [number for images, _ in batches for number in numbers(images)]

        assert order() == order()
        assert order() != order(**other)

    def test_the_dropped_images_differ_by_epoch(self):
        left_out = set()
        for epoch in range(6):
            batches = numbered(50).train_batches(8, 0, epoch)
            seen = {number for images, _ in batches for number in numbers(images)}
            left_out.add(frozenset(set(range(50)) - seen))
        assert len(left_out) > 1

    def test_the_same_image_is_cropped_differently_in_another_epoch(self):
        train = numbered(1)
        train.splits["train"].images[:] = coordinates(1)
        crops = {
            next(iter(train.train_batches(1, 0, epoch)))[0].numpy().tobytes() for epoch in range(8)
        }
        assert len(crops) > 4

    def test_every_steps_crops_are_drawn_from_a_stream_of_their_own(self, monkeypatch):
        seeds, draw = [], in_memory.Augmentation.draw

        def noted(count, pad, generator):
            seeds.append(generator.initial_seed())
            return draw(count, pad, generator)

        monkeypatch.setattr(in_memory.Augmentation, "draw", noted)
        for epoch in range(3):
            list(numbered(50).train_batches(8, 5, epoch))
        assert len(seeds) == 3 * 6
        assert len(set(seeds)) == len(seeds)

    def test_a_set_smaller_than_a_batch_is_one_batch(self):
        train = numbered(5)
        assert train.steps_per_epoch(8) == 1
        ((images, _),) = train.train_batches(8, 0, 0)
        assert sorted(numbers(images)) == [0, 1, 2, 3, 4]

    def test_evaluation_batches_are_in_order_whole_and_not_augmented(self, digits):
        plain = dataclasses.replace(digits, mean=(0.0,) * 3, std=(1 / 255,) * 3)
        found = list(plain.eval_batches("val", 50))
        assert [len(targets) for _, targets in found] == [50, 50, 50, 30]
        images = torch.cat([images for images, _ in found])
        assert torch.equal(images.round().to(torch.uint8), digits.splits["val"].images)
        targets = torch.cat([targets for _, targets in found])
        assert torch.equal(targets, digits.splits["val"].targets)


class TestCutTest:
    def test_halves_are_disjoint_and_cover_test(self, digits):
        chosen, rest = digits.test_halves(0)
        assert len(chosen) == len(rest) == 180
        assert sorted([*chosen, *rest]) == list(range(360))

    def test_halves_are_stratified(self, digits):
        whole = torch.bincount(digits.splits["test"].targets)
        for half in digits.test_halves(0):
            counts = torch.bincount(digits.splits["test"].targets[torch.from_numpy(half)])
            assert (counts - whole / 2).abs().max() <= 1

    def test_the_seed_decides(self, digits):
        assert np.array_equal(digits.test_halves(4)[0], digits.test_halves(4)[0])
        assert not np.array_equal(digits.test_halves(4)[0], digits.test_halves(5)[0])

    def test_val_and_test_are_the_halves_and_train_stays(self, digits):
        cut, (chosen, rest) = digits.cut_test(3), digits.test_halves(3)
        test = digits.splits["test"]
        assert torch.equal(cut.splits["val"].images, test.images[torch.from_numpy(chosen)])
        assert torch.equal(cut.splits["test"].targets, test.targets[torch.from_numpy(rest)])
        assert cut.splits["train"] is digits.splits["train"]

    def test_its_hash_is_another_than_the_one_cut_from_train(self, digits):
        hashes = {digits.val_hash, digits.cut_test(0).val_hash, digits.cut_test(1).val_hash}
        assert len(hashes) == 3

    def test_the_hash_tells_other_val_images_under_the_same_numbers(self):
        """As where files are read in another order; without it, val would be trained on."""
        images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1)
        targets = torch.arange(12) % 2
        orders = (torch.arange(12), torch.tensor([2, 3, 0, 1, *range(4, 12)]))
        for fixed, hashes in ((False, 2), (True, 1)):
            cuts = [
                cut(
                    "own",
                    ImageSet(images[order], targets[order]),
                    ImageSet(images, targets),
                    "ab",
                    val_size=10,
                    fixed_order=fixed,
                )
                for order in orders
            ]
            assert len({each.val_hash for each in cuts}) == hashes
        again = [ImageSet(images.clone(), targets.clone()) for _ in range(2)]
        assert cut("own", *again, "ab", val_size=10).val_hash != cuts[0].val_hash
        same = [cut("own", *again, "ab", val_size=10).val_hash for _ in range(2)]
        assert same[0] == same[1]

    def test_pictures_are_those_of_the_half(self, digits):
        cut, (_, rest) = digits.cut_test(0), digits.test_halves(0)
        picture = cut.picture("test", 5)
        assert picture.shape == (32, 32, 3)
        assert np.array_equal(picture, digits.picture("test", int(rest[5])))


def ramps(count: int) -> Data:
    """`numbered`, whose pixels also rise by one from left to right, from row to row the same."""
    data = numbered(count)
    train = data.splits["train"]
    images = 4 * train.images + torch.arange(32, dtype=torch.uint8)
    return dataclasses.replace(
        data, splits={**data.splits, "train": ImageSet(images, train.targets)}
    )


def directions(data: Data, epoch: int, seed: int = 0) -> dict[int, bool]:
    """Whether each image of `ramps` that comes in an epoch is flipped, by its number."""
    found = {}
    for images, _ in data.train_batches(8, seed, epoch):
        middle = images[:, 0, 16]
        # not cropped: 4 times the number, plus 0 to 31, whose sum is 496
        numbers = ((middle.sum(dim=1) - 496) / 128).round().int().tolist()
        found |= dict(zip(numbers, (middle[:, 0] > middle[:, 31]).tolist(), strict=True))
    return found


class TestAlternatingFlip:
    @pytest.fixture
    def data(self) -> Data:
        """40 images, five whole batches of 8, flipped in every second epoch and not cropped."""
        return ramps(40).augmented("alternating", 0, "constant")

    def test_each_image_is_flipped_in_exactly_every_second_epoch(self, data):
        first, *others = (directions(data, epoch) for epoch in range(4))
        assert sorted(first) == list(range(40))
        assert any(first.values()) and not all(first.values())
        for epoch, found in enumerate(others, 1):
            assert found == {number: flip ^ (epoch % 2 == 1) for number, flip in first.items()}

    def test_the_seed_decides_which_are_flipped_first(self, data):
        assert directions(data, 0, seed=1) != directions(data, 0)

    def test_half_are_flipped_first(self):
        flipped = int(in_memory.flipped_in(0, 10_000, seed=3).sum())
        assert abs(flipped - 5000) < 5 * 50  # deviation sqrt(10000) / 2

    def test_a_resumed_epoch_is_the_tail_of_the_whole(self, data):
        whole = list(data.train_batches(8, 0, 3))
        tail = list(data.train_batches(8, 0, 3, first_step=2))
        assert len(tail) == 3
        for (images, _), (wanted, _) in zip(tail, whole[2:], strict=True):
            assert torch.equal(images, wanted)

    def test_data_that_are_not_flipped_are_refused(self, data):
        plain = dataclasses.replace(data, flip=False)
        message = refusal(plain.augmented, "alternating", None, "constant")
        assert_names(message, "data.flip", "alternating", plain.name)
        assert not any(directions(plain.augmented("random", 0, "constant"), 0).values())


class TestReflection:
    def test_a_padded_image_by_hand(self):
        image = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4)
        # the top left of nine places for the crop, then the bottom right
        draws = in_memory.Augmentation(torch.tensor([[0, 4], [0, 4]]), torch.zeros(2).bool())
        found = in_memory.augment(image.repeat(2, 1, 1, 1), draws, 2, False, "reflect")
        # rows 2 1 0 1 2 1 0 and columns 2 1 0 1 2 3 2 1 of the image
        assert found[0, 0].tolist() == [[10, 9, 8, 9], [6, 5, 4, 5], [2, 1, 0, 1]]
        assert found[1, 0].tolist() == [[10, 11, 10, 9], [6, 7, 6, 5], [2, 3, 2, 1]]

    def test_more_than_the_image_has_is_refused(self):
        assert numbered(2).augmented("random", 31, "reflect").pad == 31
        message = refusal(numbered(2).augmented, "random", 32, "reflect")
        assert_names(message, "data.pad", 32, 31)

    def test_the_data_sets_own_padding_is_the_default(self):
        assert numbered(2).augmented("random", None, "reflect").pad == in_memory.PAD


class TestMeanAndStd:
    """Of train, where a data set names none."""

    def test_they_are_those_of_all_pixels(self):
        pixels = torch.randint(0, 256, (7, 2, 5, 3), dtype=torch.uint8)
        std, mean = torch.std_mean(pixels.double() / 255, dim=(0, 2, 3))
        found = torch.tensor(in_memory.mean_and_std(pixels), dtype=torch.float64)
        torch.testing.assert_close(found, torch.stack([mean, std]), rtol=1e-12, atol=0)

    def test_a_constant_channel_is_refused(self):
        pixels = torch.randint(0, 256, (7, 2, 5, 3), dtype=torch.uint8)
        pixels[:, 1] = 9
        assert_names(refusal(in_memory.mean_and_std, pixels), "channel 1", "mean and std")
