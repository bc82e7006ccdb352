"""CIFAR-10, MNIST and digits: their splits, and what is reported if files are missing."""

import builtins
import dataclasses
import errno
import http.client
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import assert_names, refusal, run_main

from cifar10 import data, trainer
from cifar10.data import Data, ImageSet
from early_exit.errors import Unavailable, UserError


@pytest.fixture(scope="module")
def digits() -> Data:
    """scikit-learn's digits, cut by the default split seed."""
    return data.load("digits")


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

    def test_a_directory_is_told_to_be_of_no_use(self, digits, tmp_path, caplog):
        assert data.load("digits", tmp_path).val_hash == digits.val_hash
        assert_names("".join(caplog.messages), tmp_path, "scikit-learn")

    def test_another_split_seed_holds_out_others(self, digits):
        other = data.load("digits", split_seed=1)
        assert other.val_hash != digits.val_hash
        assert not torch.equal(other.splits["val"].images, digits.splits["val"].images)

    def test_test_is_the_same_for_every_split_seed(self, digits):
        other = data.load("digits", split_seed=1)
        assert torch.equal(other.splits["test"].images, digits.splits["test"].images)

    def test_they_are_never_flipped(self, digits):
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
    assert_names(refusal(data.load, "svhn"), "svhn", *data.LOADERS)


class FakeCIFAR10:
    """torchvision's CIFAR10 as a stub: 10,000 train images (5,000 are val) and 20 test images, the
    i'th holding i at row 3, column 7: red is i % 256, green i // 256."""

    url = "https://example.org/cifar-10-python.tar.gz"
    classes = tuple("abcdefghij")

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

    def test_it_may_be_flipped_and_has_its_classes(self, fake):
        assert fake.flip
        assert fake.classes == tuple("abcdefghij")

    def test_normalisation_is_imagenets(self, fake):
        assert fake.mean == (0.485, 0.456, 0.406)
        assert fake.std == (0.229, 0.224, 0.225)

    def test_absent_without_a_network_is_one_line_that_names_a_remedy(self, monkeypatch, tmp_path):
        def no_network(*_, **__):
            raise OSError("<urlopen error [Errno -3] Temporary failure\nin name resolution>")

        monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
        message = refusal(data.load, "cifar10", tmp_path)
        assert_names(
            message,
            "CIFAR-10",
            tmp_path,
            torchvision.datasets.CIFAR10.url,
            "cifar-10-batches-py",
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

    @pytest.mark.parametrize("cut", [False, True], ids=["a proxy's page", "cut off"])
    def test_another_file_is_not_the_data_and_may_pass(self, monkeypatch, tmp_path, serve, cut):
        url = serve(b"<html>Please log in</html>", cut)
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        for _ in range(2):  # what came does not count the next time either
            with pytest.raises(Unavailable) as caught:
                data.load("cifar10", tmp_path)
            assert_names(str(caught.value), url, "--dataset digits")

    def test_a_check_says_that_it_may_pass(self, monkeypatch, capsys, tmp_path, serve):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", serve(b"", True))
        flags = ("--check", "--data", tmp_path, "--save-dir", tmp_path / "run")
        code, _, err = run_main(trainer.main, "trainer.py", monkeypatch, capsys, *flags)
        assert code == 1 and err.splitlines()[-1].startswith("trainer.py: ")

    @pytest.mark.parametrize("name", ["cifar-10-batches-py", "cifar-10-batches-py/data_batch_1"])
    def test_files_of_another_user_are_named_and_not_downloaded(self, monkeypatch, tmp_path, name):
        unreadable = tmp_path / name
        unreadable.parent.mkdir(exist_ok=True)
        unreadable.mkdir()
        monkeypatch.setattr(os, "access", lambda path, _: path != unreadable)
        with pytest.raises(UserError) as refused:
            data.load("cifar10", tmp_path)
        assert str(unreadable) in str(refused.value)

    def test_a_directory_that_cannot_be_written_does_not_pass(self, monkeypatch, tmp_path):
        def no_right(*_, **__):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/somewhere")

        monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_right)
        with pytest.raises(UserError) as caught:
            data.load("cifar10", tmp_path)
        assert caught.value.code == 2
        assert_names(str(caught.value), "/somewhere")


@pytest.fixture
def serve(monkeypatch):
    """A function that serves these bytes, or fewer than it says, and gives the address."""
    servers = []

    def serve(content: bytes, cut: bool) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(content) + 1000 * cut))
                self.end_headers()
                self.wfile.write(content)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[0].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[0].server_port}/cifar-10-python.tar.gz"

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def write_idx(path: Path, array: np.ndarray) -> None:
    """An array of bytes in the format of MNIST's files."""
    head = (
        b"\0\0\x08"
        + bytes([array.ndim])
        + b"".join(size.to_bytes(4, "big") for size in array.shape)
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
        assert [mnist.size(split) for split in ("train", "val", "test")] == [55_000, 5_000, 10_000]
        assert tuple(mnist.splits["train"].images.shape[1:]) == data.SHAPES["mnist"]

    def test_train_and_val_are_the_train_files_and_test_the_test_files(self, mnist):
        def numbers_of(split):
            pixels = mnist.splits[split].images[:, 0, 0, :4].contiguous().numpy()
            return pixels.view("<u4").ravel()

        assert sorted([*numbers_of("train"), *numbers_of("val")]) == list(range(60_000))
        assert numbers_of("test").tolist() == list(range(10_000))
        for split in ("train", "val", "test"):
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

    def test_what_was_not_extracted_whole_is_extracted_again(self, monkeypatch, tmp_path):
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name in (
            f"{s}-{kind}-ubyte"
            for s in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ):
            (raw / name).write_bytes(b"\0\0\x08\x01\0\0\0\x05abc")
        (raw / "train-images-idx3-ubyte.gz").write_bytes(b"")  # it came from here
        found = []
        monkeypatch.setattr(
            torchvision.datasets.MNIST, "download", lambda _: found.extend(raw.glob("*-ubyte"))
        )
        refusal(data.load, "mnist", tmp_path)
        assert len(found) == 3 and raw / "train-images-idx3-ubyte" not in found
