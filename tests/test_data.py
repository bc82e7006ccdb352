"""Data: splits, normalisation, augmentation, batches, and what is said where data is missing."""

import builtins
import dataclasses
import http.client
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from claims import assert_names
from hypothesis import given
from hypothesis import strategies as st
from scripts import refusal

from cifar10 import data
from cifar10.data import Data, ImageSet
from early_exit import splits, tensors


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


class TestDigits:
    @pytest.mark.parametrize(("split", "size"), [("train", 1257), ("val", 180), ("test", 360)])
    def test_sizes(self, digits, split, size):
        assert digits.size(split) == size
        assert digits.splits[split].images.shape == (size, 3, 32, 32)
        assert digits.splits[split].images.dtype == torch.uint8
        assert digits.splits[split].targets.shape == (size,)

    def test_classes(self, digits):
        assert digits.classes == tuple("0123456789")
        assert data.SHAPES["digits"] == tuple(digits.splits["train"].images.shape[1:])

    def test_they_are_grey(self, digits):
        images = digits.splits["train"].images
        assert torch.equal(images[:, 0], images[:, 1])
        assert torch.equal(images[:, 0], images[:, 2])

    def test_they_use_the_range_of_a_byte(self, digits):
        images = digits.splits["train"].images
        assert images.min() == 0
        assert images.max() > 200

    def test_splits_cover_everything_once(self, digits):
        from sklearn.datasets import load_digits

        counts = sum(torch.bincount(part.targets) for part in digits.splits.values())
        assert counts.tolist() == np.bincount(load_digits().target).tolist()

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_held_out_splits_have_every_class_in_its_share(self, digits, split):
        pool = ("train", "val") if split == "val" else ("train", "val", "test")
        whole = sum(torch.bincount(digits.splits[name].targets) for name in pool).double()
        expected = whole * digits.size(split) / whole.sum()
        found = torch.bincount(digits.splits[split].targets)
        assert (found - expected).abs().max() < 1

    def test_the_same_split_seed_holds_out_the_same(self, digits):
        again = data.load("digits", split_seed=0)
        assert again.val_hash == digits.val_hash
        assert torch.equal(again.splits["val"].images, digits.splits["val"].images)

    def test_another_split_seed_holds_out_others(self, digits):
        other = data.load("digits", split_seed=1)
        assert other.val_hash != digits.val_hash
        assert not torch.equal(other.splits["val"].images, digits.splits["val"].images)

    def test_test_is_the_same_for_every_split_seed(self, digits):
        other = data.load("digits", split_seed=1)
        assert torch.equal(other.splits["test"].images, digits.splits["test"].images)

    def test_they_are_never_mirrored(self, digits):
        """A crop of an image that differs left and right is never one of its mirror image."""
        assert not digits.flip
        ramp = torch.arange(32, dtype=torch.uint8).add(1).expand(64, 3, 32, 32).contiguous()
        train = ImageSet(ramp, torch.zeros(64, dtype=torch.int64))
        ramps = dataclasses.replace(digits, splits={"train": train}, mean=(0.0,) * 3)
        ((images, _),) = ramps.train_batches(64, seed=0, epoch=0)
        assert bool((images[..., 17] > images[..., 14])[:, :, 16].all())

    def test_without_scikit_learn_it_says_what_to_run(self, monkeypatch):
        real = builtins.__import__

        def absent(name, *arguments, **options):
            if name.startswith("sklearn"):
                raise ImportError(name)
            return real(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", absent)
        message = refusal(data.load, "digits")
        assert_names(message, "digits", "scikit-learn", "pip install -r requirements.txt")


def test_an_unknown_data_set_lists_those_that_are():
    assert_names(refusal(data.load, "cifar100"), "cifar100", "cifar10", "digits", "mnist")


class FakeCIFAR10:
    """torchvision's CIFAR10 as a stub: 10,000 train images (5,000 are val) and 20 test images, the
    i'th holding i at row 3, column 7: red is i % 256, green i // 256."""

    url = "https://example.org/cifar-10-python.tar.gz"
    classes = list("abcdefghij")

    def __init__(self, root, train, download):
        assert not download
        count = 10_000 if train else 20
        self.data = np.zeros((count, 32, 32, 3), np.uint8)
        self.data[:, 3, 7, 1], self.data[:, 3, 7, 0] = np.divmod(np.arange(count), 256)
        self.targets = [index % 10 for index in range(count)]


class TestCIFAR10:
    @pytest.fixture
    def fake(self, monkeypatch, tmp_path) -> Data:
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
        return data.load("cifar10", tmp_path)

    @staticmethod
    def stored_at(part: ImageSet) -> np.ndarray:
        """Which images of the stub a split holds."""
        red, green = part.images[:, :2, 3, 7].long().unbind(dim=1)
        return (256 * green + red).numpy()

    def test_channels_come_first(self, fake):
        images = fake.splits["test"].images
        assert images.shape == (20, 3, 32, 32)
        assert images[:, 0, 3, 7].tolist() == list(range(20))
        assert int(images.sum()) == sum(range(20))

    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_targets_belong_to_their_images_and_nothing_is_shuffled(self, fake, split):
        stored_at = self.stored_at(fake.splits[split])
        assert np.array_equal(fake.splits[split].targets.numpy(), stored_at % 10)
        assert bool((np.diff(stored_at) > 0).all())

    def test_train_and_val_are_disjoint_and_together_all(self, fake):
        train, val = (self.stored_at(fake.splits[split]) for split in ("train", "val"))
        assert sorted([*train, *val]) == list(range(10_000))

    def test_val_takes_five_thousand_a_tenth_of_each_class(self, fake):
        assert torch.bincount(fake.splits["val"].targets).tolist() == [500] * 10
        assert torch.bincount(fake.splits["train"].targets).tolist() == [500] * 10

    def test_it_may_be_mirrored_and_has_its_classes(self, fake):
        assert fake.flip
        assert fake.classes == tuple("abcdefghij")

    def test_normalisation_is_imagenets(self, fake):
        assert fake.mean == (0.485, 0.456, 0.406)
        assert fake.std == (0.229, 0.224, 0.225)

    def test_absent_and_no_network_is_one_line_that_says_what_to_do(self, monkeypatch, tmp_path):
        def no_network(*_, **__):
            raise OSError("<urlopen error [Errno -3] Temporary failure\nin name resolution>")

        monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
        message = refusal(data.load, "cifar10", tmp_path)
        assert_names(
            message, "CIFAR-10", tmp_path, torchvision.datasets.CIFAR10.url, "cifar-10-batches-py",
            "--dataset digits",
        )

    def test_a_connection_that_breaks_is_the_same_line(self, monkeypatch, tmp_path):
        def breaks(*_, **__):
            raise http.client.IncompleteRead(b"half")

        monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", breaks)
        assert "--dataset digits" in refusal(data.load, "cifar10", tmp_path)

    def test_damaged_files_are_downloaded_anew(self, monkeypatch, tmp_path):
        """And where that fails, the line is the same."""
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        (folder / "data_batch_1").write_bytes(b"half a file")
        asked = []

        def no_network(*_, **__):
            asked.append(True)
            raise OSError("no network")

        monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
        assert "--dataset digits" in refusal(data.load, "cifar10", tmp_path)
        assert asked == [True]


class TestNormalise:
    def test_by_hand(self):
        images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
        mean, std = (0.5, 0.25, 0.2), (0.5, 0.125, 0.4)
        found = dataclasses.replace(numbered(2), mean=mean, std=std).normalise(images)
        # (0 - .5) / .5, (128/255 - .25) / .125, (1 - .2) / .4
        expected = torch.tensor([-1.0, 2.015686, 2.0]).view(1, 3, 1, 1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def test_the_bytes_are_left_alone(self):
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


def crop_and_flip(image: np.ndarray, top: int, left: int, mirrored: bool) -> np.ndarray:
    """One image (3, 32, 32), the obvious way."""
    padded = np.zeros((3, 40, 40), np.uint8)
    padded[:, 4:36, 4:36] = image
    crop = padded[:, top : top + 32, left : left + 32]
    return crop[:, :, ::-1] if mirrored else crop


def augmented(images: torch.Tensor, seed: int, flip: bool) -> torch.Tensor:
    """`images` after draws of that seed."""
    draws = tensors.Draws.of(len(images), tensors.PAD, torch.Generator().manual_seed(seed))
    return tensors.augment(images, draws, tensors.PAD, flip)


@pytest.fixture(scope="module")
def many() -> torch.Tensor:
    """`coordinates`, augmented 16,200 times: 200 for each of 9 x 9 offsets."""
    return augmented(coordinates(16_200), 2, True)


class TestAugment:
    @pytest.mark.parametrize("flip", [True, False])
    def test_equals_cropping_and_mirroring_one_image_after_the_other(self, flip):
        images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8,
                               generator=torch.Generator().manual_seed(0))
        found = augmented(images, 1, flip)
        draws = torch.Generator().manual_seed(1)
        tops, lefts = torch.randint(0, 9, (2, 50), generator=draws).tolist()
        mirrored = (torch.rand(50, generator=draws) < 0.5).tolist()
        assert any(mirrored) and not all(mirrored)
        for index in range(50):
            expected = crop_and_flip(
                images[index].numpy(), tops[index], lefts[index], flip and mirrored[index]
            )
            assert np.array_equal(found[index].numpy(), expected), index

    def test_every_offset_is_equally_likely(self, many):
        mirrored = many[:, 1, 16, 15] > many[:, 1, 16, 16]
        row = many[:, 0, 16, 16].long() - 13  # row 16 of a crop is row 12 + top, counted from 1
        column = torch.where(mirrored, many[:, 1, 16, 15], many[:, 1, 16, 16]).long() - 13
        counts = torch.bincount(9 * row + column, minlength=81)
        assert len(counts) == 81
        assert counts.min() > 0
        # chi square of 80 degrees of freedom: mean 80, deviation 12.6
        assert ((counts - 200.0) ** 2 / 200).sum() < 80 + 5 * 12.6

    def test_half_are_mirrored(self, many):
        mirrored = (many[:, 1, 16, 15] > many[:, 1, 16, 16]).sum()
        assert abs(int(mirrored) - 8100) < 5 * 63.6  # deviation sqrt(16200) / 2

    def test_mirroring_does_not_depend_on_the_offset(self, many):
        mirrored = many[:, 1, 16, 15] > many[:, 1, 16, 16]
        low = many[:, 0, 16, 16] < 17  # the upper four of nine rows, 7200 expected
        share = mirrored[low].double().mean()
        assert abs(float(share) - 0.5) < 5 * 0.5 / 7000**0.5

    def test_without_flip_nothing_is_mirrored(self):
        found = augmented(coordinates(500), 2, False)
        assert bool((found[:, 1, 16, 15] < found[:, 1, 16, 16]).all())

    def test_the_originals_are_left_alone(self):
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
        seen = [number for images, _ in numbered(50).train_batches(8, 0, 0)
                for number in numbers(images)]
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

    def test_the_images_left_out_differ_by_epoch(self):
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
        seeds, draw = [], tensors.Draws.of

        def noted(count, pad, generator):
            seeds.append(generator.initial_seed())
            return draw(count, pad, generator)

        monkeypatch.setattr(tensors.Draws, "of", noted)
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


def write_idx(path: Path, array: np.ndarray) -> None:
    """An array of bytes in the format of MNIST's files."""
    head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(
        size.to_bytes(4, "big") for size in array.shape
    )
    path.write_bytes(head + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory) -> Path:
    """Files as MNIST's: every image is even, with its number in the first four pixels."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, :4] = np.arange(count, dtype="<u4").view(np.uint8).reshape(count, 4)
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(count) % 10)
    return root


class TestMnist:
    @pytest.fixture(scope="class")
    @classmethod
    def mnist(cls, mnist_root) -> Data:
        return data.load("mnist", mnist_root)

    def test_sizes_and_shapes(self, mnist):
        assert [mnist.size(split) for split in data.SPLITS] == [55_000, 5_000, 10_000]
        assert tuple(mnist.splits["train"].images.shape[1:]) == data.SHAPES["mnist"]

    def test_train_and_val_are_the_train_files_and_test_the_test_files(self, mnist):
        def numbers_of(split):
            pixels = mnist.splits[split].images[:, 0, 0, :4].contiguous().numpy()
            return pixels.view("<u4").ravel()

        assert sorted([*numbers_of("train"), *numbers_of("val")]) == list(range(60_000))
        assert numbers_of("test").tolist() == list(range(10_000))
        for split in data.SPLITS:
            assert np.array_equal(numbers_of(split) % 10, mnist.splits[split].targets.numpy())

    def test_batches_are_grey_and_moved_by_up_to_two_pixels_and_never_flipped(self, mnist):
        assert (mnist.pad, mnist.flip) == (2, False)
        images, _ = next(mnist.train_batches(64, 0, 0))
        assert images.shape == (64, 1, 28, 28)
        black = -data.MNIST_MEAN[0] / data.MNIST_STD[0]
        first = (images[:, 0] > black + 1e-3).nonzero()
        assert first[:, 1].max() <= 2 and first[:, 2].max() <= 3 + 2

    def test_a_picture_has_three_channels(self, mnist):
        assert mnist.picture("test", 3).shape == (28, 28, 3)

    def test_absent_and_not_to_be_had(self, monkeypatch, tmp_path):
        def no_network(self):
            raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

        monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
        message = refusal(data.load, "mnist", tmp_path)
        assert "http" in message
        assert_names(message, "MNIST", tmp_path, "MNIST/raw", "--dataset digits")


class TestStratified:
    @given(
        targets=st.lists(st.integers(0, 4), min_size=1, max_size=80),
        share=st.floats(0, 1),
        seed=st.integers(0, 1000),
    )
    def test_every_class_gets_its_share_to_within_one(self, targets, share, seed):
        targets = np.array(targets)
        size = int(share * len(targets))
        chosen = splits.stratified(targets, size, seed)
        assert len(chosen) == size
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        for label in np.unique(targets):
            exact = (targets == label).sum() * size / len(targets)
            assert abs((targets[chosen] == label).sum() - exact) < 1

    def test_the_seed_decides(self):
        targets = np.arange(100) % 5
        first, again, other = (splits.stratified(targets, 20, seed) for seed in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_every_image_can_be_chosen(self):
        targets = np.arange(20) % 2
        chosen = [splits.stratified(targets, 4, seed) for seed in range(100)]
        assert set(np.concatenate(chosen)) == set(range(20))


class TestHash:
    def test_names_the_images(self):
        one = splits.index_hash("cifar10", np.array([1, 2, 3]))
        assert one == splits.index_hash("cifar10", np.array([1, 2, 3], dtype=np.int32))
        assert one != splits.index_hash("cifar10", np.array([1, 2, 4]))
        assert one != splits.index_hash("digits", np.array([1, 2, 3]))


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

    def test_pictures_are_those_of_the_half(self, digits):
        cut, (_, rest) = digits.cut_test(0), digits.test_halves(0)
        picture = cut.picture("test", 5)
        assert picture.shape == (32, 32, 3)
        assert np.array_equal(picture, digits.picture("test", int(rest[5])))
