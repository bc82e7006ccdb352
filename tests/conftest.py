"""Shared fixtures: a tiny multi-exit network that tells easy images from hard, and images.

EARLY_EXIT_TEST_THREADS: how many threads torch uses, 1 if not set.
EARLY_EXIT_PERTURB: how many epsilon every convolution and linear layer is off; see perturbation.py.
"""

import contextlib
import copy
import gc
import os
import shutil

import helpers
import hypothesis
import numpy as np
import pytest
import torch
from helpers import TASK, tiny_run
from perturbation import perturbed, wanted
from PIL import Image
from torch import nn

from cifar10.resnet import ResNet
from early_exit import export
from early_exit.choosing.goals import FixedThresholds, MaxDrop
from early_exit.choosing.record import ExitRecord, RecordInfo, record
from early_exit.config import DataConfig
from early_exit.evaluation.evaluate import evaluate
from early_exit.model.network import MultiExitNetwork

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as `import_package` does

# The same examples every time; nothing is stored between runs.
hypothesis.settings.register_profile("early_exit", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("early_exit")

PLACES = ("stem", "layer1", "layer2")
CLASSES = 4
SIDE = 16
# The logits of the target that the exits of `trained_net` are fitted to.
SCALES = (4.0, 5.0, 5.0, 6.0)
CPU = torch.device("cpu")


def pytest_collection_finish():
    """Objects that exist by now are not collected: the garbage collections at the end of every
    training need not go through them again."""
    gc.freeze()


def pytest_unconfigure():
    """So that everything is freed at the end."""
    gc.unfreeze()


THREADS = int(os.environ.get("EARLY_EXIT_TEST_THREADS") or 1)


@pytest.fixture(scope="session", autouse=True)
def threads():
    """One thread, if the environment does not ask for more: tiny tensors gain nothing from them,
    and the machine may be busy."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def threads_put_back():
    """As many in every test: a run sets its own number for the whole process."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def perturbation():
    """The rounding of another processor, if the environment asks for it."""
    with perturbed(wanted()) if wanted() else contextlib.nullcontext():
        yield


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
    """Noise with one of four patterns in it, from invisible to clear, and which one it is.

    numpy draws them: torch's normal numbers differ in the last bit from processor to processor.
    """
    rng = np.random.default_rng(seed)
    tiles = np.random.default_rng(99).standard_normal((CLASSES, 3, 4, 4))
    patterns = np.tile(tiles, (1, 1, SIDE // 4, SIDE // 4))
    target = rng.integers(CLASSES, size=count)
    strength = rng.random((count, 1, 1, 1))
    noise = rng.standard_normal((count, 3, SIDE, SIDE))
    images = torch.from_numpy(strength * patterns[target] + noise)
    return images.float(), torch.from_numpy(target)


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


def _fit(linear: nn.Linear, inputs: torch.Tensor, target: torch.Tensor, scale: float) -> None:
    """Ridge regression of `scale` for the target's class and 0 for the others."""
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1).to(inputs)], dim=1)
    wanted = scale * nn.functional.one_hot(target, CLASSES).to(inputs)
    penalty = len(inputs) * 0.01 * torch.eye(inputs.shape[1]).to(inputs)
    solution = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ wanted)
    with torch.no_grad():
        linear.weight.copy_(solution[:-1].T)
        linear.bias.copy_(solution[-1])


@pytest.fixture(scope="session")
def trained_net(make_net):
    """A net of three early exits whose scores differ widely between images. Shared by all tests, so
    not to be changed.

    Its weights are the same on every processor, unlike those that SGD gives: the filters are drawn
    by numpy, BatchNorm's statistics and the classifiers are computed from a sample, in
    float64. Each value is rounded to float32 once, at the end.
    """
    net, rng = make_net().double(), np.random.default_rng(0)
    inputs, target = _draw(1024, seed=2)
    inputs = inputs.double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                size = tuple(module.weight.shape)
                filters = rng.standard_normal(size) * (2 / np.prod(size[1:])) ** 0.5
                module.weight.copy_(torch.from_numpy(filters))
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics are the sample's
        net.train()(inputs)
        net.eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
        features = inputs
        for index, stage in enumerate(net.stages):
            linear = net.backbone.linear if stage.head is None else stage.head.linear
            seen = []
            handle = linear.register_forward_pre_hook(lambda _, x, seen=seen: seen.extend(x))
            features, _ = stage(features)
            handle.remove()
            _fit(linear, seen[0], target, SCALES[index])
    return net.float()


@pytest.fixture(scope="session")
def exact_net(trained_net):
    """`trained_net` in float64, where two correct ways to compute a logit agree to all the digits
    of float32 and every test of agreement is sharp. Not to be changed."""
    return copy.deepcopy(trained_net).double()


@pytest.fixture(scope="session")
def exact_images(images):
    """The first 512 of `images`, in float64."""
    return images[:512].double()


@pytest.fixture(scope="session")
def exact_stored(stored):
    """`stored` for `exact_images`."""
    return stored.subset(np.arange(512), "test", "512 images")


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
            precision="off",
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
def stored(exact_net, images, targets, record_of):
    """The record of `exact_net` on `images`, rounded to float32: the same on every processor, but
    for a last digit here and there."""
    return record_of(exact_net, images.double(), targets)


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory):
    """A run of two epochs with two evaluations; in one of them, `mine`, about half of the first
    images of test exit at once. Not to be changed."""
    directory = tiny_run(tmp_path_factory.mktemp("evaluated") / "run", TASK)
    evaluate(directory, TASK, MaxDrop(0.005), overrides=helpers.CPU, live=False, draw=False)
    record = ExitRecord.load(directory / "records" / "test-off")
    scores = torch.from_numpy(record.logits[:7, 0]).softmax(dim=-1).amax(dim=-1).sort().values
    widest = int(scores.diff()[1:5].argmax()) + 1  # a gap that rounding does not cross
    halfway = FixedThresholds((float(scores[widest : widest + 2].mean()),), calibrate=False)
    evaluate(directory, TASK, halfway, overrides=helpers.CPU, live=False, draw=False, name="mine")
    return directory


@pytest.fixture
def evaluated_copy(evaluated_run, tmp_path):
    """A copy of `evaluated_run`, to be changed."""
    return shutil.copytree(evaluated_run, tmp_path / "copy")


@pytest.fixture
def photos(tmp_path):
    """A folder with the first seven images of test as files, in two folders below."""
    data = TASK.load_data(DataConfig(dataset="digits"))
    for index in range(7):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.picture("test", index)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def preset(tmp_path):
    """A function that writes a preset and gives its path."""

    def write(text: str):
        path = tmp_path / "preset.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def deployed_model(evaluated_run, tmp_path_factory):
    """`evaluated_run` with its evaluation `mine` as a deployed model. Not to be changed."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    directory = tmp_path_factory.mktemp("deployed") / "model"
    flags = ["--eval", "mine", "--task", "helpers:TASK", "--format", "onnx"]
    export.main([str(evaluated_run), str(directory), *flags])
    return directory


@pytest.fixture
def deployed_copy(deployed_model, tmp_path):
    """A copy of `deployed_model`, to be changed."""
    return shutil.copytree(deployed_model, tmp_path / "model")
