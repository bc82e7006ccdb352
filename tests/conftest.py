"""Shared fixtures: a tiny multi-exit network that tells easy images from hard, and images."""

import copy
import gc

import hypothesis
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from cifar10.resnet import ResNet
from early_exit.network import MultiExitNetwork
from early_exit.records import ExitRecord, RecordInfo, record

# The same examples every time, and nothing kept between runs.
hypothesis.settings.register_profile("early_exit", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("early_exit")

PLACES = ("stem", "layer1", "layer2")
CLASSES = 4
SIDE = 16
CPU = torch.device("cpu")


def pytest_collection_finish():
    """What is imported by now stays: the collections of garbage that every training ends with need
    not look through it again."""
    gc.freeze()


def pytest_unconfigure():
    """So that the end finds everything."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread: tiny tensors gain nothing from more, and the machine may be busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_net():
    """Builds a ResNet-8 (one block a stage) with exits, untrained and seeded, in train mode."""

    def build(places=PLACES, head="mixed_pool", num_classes=CLASSES, side=SIDE, seed=0):
        torch.manual_seed(seed)
        backbone = ResNet(1, num_classes)
        return MultiExitNetwork(
            backbone,
            backbone.units(),
            places,
            head=head,
            num_classes=num_classes,
            example=torch.zeros(1, 3, side, side),
        )

    return build


def _draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with one of four wallpapers in it, from invisible to plain, and which one it is."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(99))
    patterns = tiles.repeat(1, 1, SIDE // 4, SIDE // 4)
    target = torch.randint(CLASSES, (count,), generator=generator)
    strength = torch.rand(count, 1, 1, 1, generator=generator)
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return strength * patterns[target] + noise, target


@pytest.fixture(scope="session")
def drawn():
    """2,048 images (B, 3, 16, 16) and their targets (B,)."""
    return _draw(2048, seed=1)


@pytest.fixture(scope="session")
def images(drawn):
    """2,048 images, (B, 3, 16, 16)."""
    return drawn[0]


@pytest.fixture(scope="session")
def targets(drawn):
    """The classes of `images`, (B,)."""
    return drawn[1]


@pytest.fixture(scope="session")
def trained_net(make_net, one_thread):
    """A net of three early exits, trained for a few steps: its scores are really spread. Shared
    by all tests, so not to be changed."""
    net = make_net().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    inputs, target = _draw(64 * 30, seed=2)
    for rows in torch.arange(len(target)).split(64):
        loss = sum(cross_entropy(said, target[rows]) for said in net(inputs[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.fixture
def tiny_net(trained_net):
    """`trained_net` for one test alone, in eval mode."""
    return copy.deepcopy(trained_net)


@pytest.fixture(scope="session")
def make_record():
    """Builds an exit record from logits (images, exits, classes) and targets."""

    def build(logits, targets, split="val", exit_names=None):
        logits = np.asarray(logits, np.float32)
        num_exits = logits.shape[1]
        info = RecordInfo(
            split=split,
            split_hash=f"hash of {split}",
            exit_names=exit_names or (*(f"exit{i}" for i in range(num_exits - 1)), "final"),
            stage_macs=(10,) * num_exits,
            head_macs=(*(1,) * (num_exits - 1), 0),
            precision="float32",
            weights="weights of the last epoch",
            device="CPU",
        )
        return ExitRecord(logits, np.asarray(targets, np.int64), info)

    return build


@pytest.fixture(scope="session")
def record_of(make_record):
    """Records every exit of a net on images, 256 at a time, as an evaluation does."""

    def build(net, images, targets):
        batches = zip(images.split(256), targets.split(256), strict=True)
        blank = make_record(np.zeros((1, net.num_exits, 1)), [0], "test", net.exit_names)
        return record(net, batches, len(images), blank.info, CPU, torch.no_grad)

    return build


@pytest.fixture(scope="session")
def stored(trained_net, images, targets, record_of):
    """What every exit of `trained_net` says about `images`."""
    return record_of(trained_net, images, targets)
