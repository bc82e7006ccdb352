"""CIFAR-100: read from a small archive in the original layout, and a run on it."""

import hashlib
import http.server
import json
import pickle
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_names, run_main
from PIL import Image
from torchvision.datasets import CIFAR100

from cifar10 import data, trainer
from cifar10 import eval as evaluation
from early_exit import compare, export, predict
from early_exit.config import Config, DataConfig, ModelConfig
from early_exit.data.in_memory import Data
from early_exit.errors import Unavailable

FOLDER = "cifar-100-python"
NAMES = [f"fine {index}" for index in range(100)]
TRAIN, TEST = 5200, 200  # images; 5,000 of train are val


def entry(count: int) -> dict:
    """`count` images as CIFAR's files hold them: the i'th has i % 256 and i // 256 as red and green
    of row 3, column 7, and the fine class i % 100."""
    images = np.zeros((count, 3, 32, 32), np.uint8)
    images[:, 1, 3, 7], images[:, 0, 3, 7] = np.divmod(np.arange(count), 256)
    fine = [index % 100 for index in range(count)]
    return {
        "data": images.reshape(count, 3072),
        "fine_labels": fine,
        "coarse_labels": [label // 5 for label in fine],
    }


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """An archive as CIFAR-100's, beside the files that it was made of."""
    root = tmp_path_factory.mktemp("made")
    (root / FOLDER).mkdir()
    meta = {"fine_label_names": NAMES, "coarse_label_names": [f"coarse {i}" for i in range(20)]}
    for name, content in (("train", entry(TRAIN)), ("test", entry(TEST)), ("meta", meta)):
        (root / FOLDER / name).write_bytes(pickle.dumps(content, protocol=2))
    with tarfile.open(root / CIFAR100.filename, "w:gz", compresslevel=1) as file:
        file.add(root / FOLDER, FOLDER)
    return root / CIFAR100.filename


@pytest.fixture
def published(archive, monkeypatch):
    """torchvision's CIFAR100 with this archive's checksums, downloaded from this machine."""

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    folder = archive.parent / FOLDER
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5(folder / "meta")})

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(archive.parent))
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def loaded(published, tmp_path) -> Data:
    """The data set, downloaded."""
    return data.load("cifar100", tmp_path)


def test_the_checksum_is_the_published_one():
    assert CIFAR100.tgz_md5 == "eb9058c3a382ffc7106e4002c42a8d85"


def test_it_is_downloaded_and_cut(loaded, tmp_path):
    assert (tmp_path / FOLDER / "meta").exists()
    assert loaded.name == "cifar100" and loaded.flip
    assert loaded.classes == tuple(NAMES)
    assert {split: loaded.size(split) for split in loaded.splits} == {
        "train": TRAIN - 5000,
        "val": 5000,
        "test": TEST,
    }
    assert torch.bincount(loaded.splits["val"].targets).tolist() == [50] * 100
    # of the official train images, rounded to four digits: 0.50708 0.48655 0.44092 and so on
    assert (loaded.mean, loaded.std) == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def test_fine_classes_belong_to_their_images(loaded):
    numbers = []
    for split in ("train", "val", "test"):
        part = loaded.splits[split]
        assert tuple(part.images.shape[1:]) == data.SHAPES["cifar100"]
        red, green = part.images[:, :2, 3, 7].long().unbind(dim=1)
        assert torch.equal((256 * green + red) % 100, part.targets)
        numbers.append((256 * green + red).tolist())
    assert sorted(numbers[0] + numbers[1]) == list(range(TRAIN))
    assert numbers[2] == list(range(TEST))


def test_another_split_seed_holds_out_others(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "download", lambda _: pytest.fail("it is there already"))
    again, other = (data.load("cifar100", tmp_path, split_seed=seed) for seed in (0, 1))
    assert again.val_hash == loaded.val_hash != other.val_hash


@pytest.mark.usefixtures("published")
def test_an_archive_with_another_checksum_is_not_read(monkeypatch, tmp_path):
    monkeypatch.setattr(CIFAR100, "tgz_md5", "0" * 32)
    with pytest.raises(Unavailable) as caught:
        data.load("cifar100", tmp_path)
    assert_names(str(caught.value), CIFAR100.url, FOLDER, "--dataset digits")
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.usefixtures("loaded")
def test_a_changed_file_is_never_unpickled(monkeypatch, tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path / "harmed").touch, ()

    (tmp_path / FOLDER / "test").write_bytes(pickle.dumps(Harm()))
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:1/absent")
    (tmp_path / CIFAR100.filename).unlink()
    with pytest.raises(Unavailable):
        data.load("cifar100", tmp_path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("arch", ["resnet20", "msdnet6", "airbench_slim", "alexnet"])
def test_the_networks_have_a_hundred_classes_and_no_public_accuracy(arch):
    config = Config(data=DataConfig(dataset="cifar100"), model=ModelConfig(arch=arch))
    network = trainer.build_network(config, 100).eval()
    with torch.inference_mode():
        assert [tuple(logits.shape) for logits in network(torch.zeros(2, 3, 32, 32))] == [
            (2, 100)
        ] * network.num_exits
    assert trainer.TASK.static_networks(config, 100) == []


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_a_run_is_trained_evaluated_exported_compared_and_predicts(monkeypatch, capsys, tmp_path):
    def call(main, name, *arguments) -> str:
        code, out, err = run_main(main, name, monkeypatch, capsys, *arguments)
        assert code == 0, err
        return out

    run, where = tmp_path / "run", ("--data", tmp_path, "--threads", 1, "--device", "cpu")
    flags = ("--dataset", "cifar100", "--arch", "airbench_slim", "--exits", "group2")
    more = ("--head", "pooled", "--epochs", 1, "--amp", "off", "--save-dir", run)
    call(trainer.main, "trainer.py", *flags, *more, *where)
    call(evaluation.main, "eval.py", run, "--thresholds", 0.02, "--no-live", *where)
    (report,) = run.glob("eval/*/report.json")
    found = json.loads(report.read_text())
    assert found["run"]["dataset"] == "cifar100" and len(found["classes"]) == 100
    assert found["top5"] is not None and found["static_networks"] == []
    assert "cifar100" in report.with_suffix(".md").read_text()
    call(export.main, "export", run, tmp_path / "copy")
    assert_names((tmp_path / "copy" / "README.md").read_text(), "cifar100", "100 classes", "fine 0")
    out = call(compare.main, "compare", run, "--out", tmp_path / "compared", "--no-plots")
    assert "cifar100" in out
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "black.png")
    assert "fine " in call(predict.main, "predict", tmp_path / "copy", tmp_path / "black.png")
