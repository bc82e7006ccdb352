"""The models of benchmarks/serving.py: a run, or a network with random weights, exported with its
exits and as the plain network, and the images to send."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference import build_network, policy_for_shares, set_statistics
from network_flags import check_order

from early_exit import classifier as classifiers
from early_exit import export_onnx
from early_exit.classifier import Classifier, reported_test
from early_exit.cli import flags
from early_exit.config import Config
from early_exit.data.pixels import normalise
from early_exit.errors import UserError
from early_exit.evaluation.upgrade import read_report
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.runtimes.onnx_models import pixels_of
from early_exit.inference.runtimes.packages import import_package
from early_exit.inference.runtimes.table import INTEGERS, find_runtime
from early_exit.model.cost import network_cost
from early_exit.system.device import describe_device
from early_exit.task import Task
from early_exit.trained import Loaded, load_data

MEAN, STD = (0.5,) * 3, (1 / 12**0.5,) * 3  # of uniformly random pixels


@dataclass(frozen=True)
class Models:
    """What was exported, and images for it."""

    name: str
    machine: str
    """The processor and the runtime."""
    images: np.ndarray
    """(I, C, H, W) uint8."""
    target: np.ndarray | None
    """The classes (I,); None for random images."""


def make_models(args: argparse.Namespace, directory: Path) -> Models:
    """Exports what the flags name into the folders `exits` and `plain` of a directory.

    The plain network has no early exits and no heads of them. Raises UserError for a run that
    cannot be read, that has no early exits or that is in 8-bit integers.
    """
    if args.run is None:
        classifier, report, images, target = random_classifier(args)
        name = f"{args.arch} with random weights, {args.image_size} pixels"
    else:
        classifier, report, images, target = trained_classifier(args)
        run = report["run"]
        name = f"{run['arch']}, {run['dataset']}, {len(images)} images of test"
    policy = classifier.policy
    if not any(policy.enabled):
        raise UserError("the policy has no early exit, so there is nothing to compare")
    plain = replace(policy, enabled=(False,) * len(policy.enabled), guarantee=None)
    for kind, one in (("exits", policy), ("plain", plain)):
        (directory / kind).mkdir()
        export_onnx.write(directory / kind, replace(classifier, policy=one), report)
    processor = describe_device(torch.device("cpu")).rpartition(",")[0]  # without torch's threads
    runtime = f"{args.runtime} {import_package(args.runtime).__version__}"
    return Models(name, f"{processor}, {runtime}", images, target)


def trained_classifier(
    args: argparse.Namespace,
) -> tuple[Classifier, dict[str, Any], np.ndarray, np.ndarray]:
    """A run as it is exported, the report of its evaluation, and the images and classes of test."""
    evaluation = classifiers.find_evaluation(args.run, args.eval)
    report = read_report(evaluation / "report.json")
    if export_onnx.reference_for(report) in INTEGERS:
        raise UserError(
            f"{evaluation} is in 8-bit integers; name an evaluation in float32 with --eval"
        )
    classifier = classifiers.load(
        evaluation,
        task=args.task,
        device="cpu",
        overrides=flags.settings_of(args),
        runtime="torch",
    )
    data, _ = load_data(classifier.loaded, classifier.task, "test")
    data = reported_test(data, report)
    batches = list(data.eval_batches("test", 256))
    images = torch.cat([pixels_of(batch, data.mean, data.std) for batch, _ in batches])
    target = torch.cat([target for _, target in batches])
    return classifier, report, images.contiguous().numpy(), target.numpy()


def random_classifier(
    args: argparse.Namespace,
) -> tuple[Classifier, dict[str, Any], np.ndarray, None]:
    """A network with random weights under the policy with which the requested shares of random
    images exit, what `export_onnx` needs of a report, and the images."""
    torch.manual_seed(0)
    network = build_network(args.arch, args.exits, None, args.image_size)
    check_order(args, network.exit_names)
    pixels = torch.randint(0, 256, (args.images, *network.image_shape), dtype=torch.uint8)
    images = normalise(pixels, MEAN, STD, torch.channels_last)
    network.to(memory_format=torch.channels_last)
    set_statistics(network, images[:256])
    built = RuntimeNetwork(
        network, find_runtime("torch", "cpu", torch.get_num_threads()), images[:2]
    )
    policy = policy_for_shares(built, images, args.exit_shares, "max_prob")
    classes = tuple(map(str, range(num_classes(built, images[:2]))))
    loaded = Loaded(
        run_dir=Path(),  # nothing is read from it
        config=Config(),
        network=network,
        classes=classes,
        normalisation={"mean": list(MEAN), "std": list(STD)},
        device=torch.device("cpu"),
        precision="off",
        weights="random weights",
        val_hash="",
        unseen_val=None,
    )
    task = Task(build_network=no_data, load_data=no_data)
    cost = network_cost(network)
    classifier = Classifier(classes, policy, cost, loaded, task, built)
    unknown: dict[str, Any] = {"accuracy": None, "macs_share": None}
    report = {
        "run": {"arch": args.arch, "dataset": None, "weights": loaded.weights},
        "environment": {"runtime": args.runtime, "precision": "float32"},
        "choice": {"test_images": 0, "val_images": 0},
        "test": unknown,
        "val": unknown,
        "final_accuracy": None,
        "exits": [],
        "curve": [],
    }
    return classifier, report, pixels.numpy(), None


def num_classes(network: RuntimeNetwork, images: torch.Tensor) -> int:
    """The number of classes of a network."""
    with torch.inference_mode():
        logits: Sequence[torch.Tensor] = network(images)
    return logits[-1].shape[1]


def no_data(*_: Any) -> Any:
    """Of the task of a network with random weights, which is neither built again nor has data."""
    raise UserError("a network with random weights has no data")
