"""Writes a run as a deployed model: one ONNX file per segment, the policy and the manifest.

`early_exit.deployed` reads it, without torch. The files are compared with the run before they are
written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import early_exit
from early_exit.classifier import Classifier
from early_exit.data.pixels import normalise
from early_exit.errors import UserError
from early_exit.inference.criteria import Traits, get_traits
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.network import RuntimeNetwork, plain_tensors
from early_exit.inference.runtimes.onnx_check import check_segments
from early_exit.inference.runtimes.onnx_export import OPSET
from early_exit.inference.runtimes.onnx_models import pixels_of
from early_exit.inference.runtimes.packages import import_package
from early_exit.inference.runtimes.table import DEPLOYABLE, INTEGERS, NEEDED_TO_BUILD, split_name
from early_exit.inference.segments import segment_of, spans
from early_exit.manifest import NAME, CentreCrop, ImageInput, Manifest, SegmentFile
from early_exit.system.device import PRECISIONS
from early_exit.system.files import write_bytes, write_text
from early_exit.system.provenance import versions
from early_exit.trained import in_runtime

log = logging.getLogger(__name__)

IMAGES = 64  # that the files are checked with


def write(
    directory: Path, classifier: Classifier, report: dict[str, Any], input_type: str = "uint8"
) -> Manifest:
    """Writes a run into a new directory, and returns the manifest.

    classifier: the run on the CPU, in the runtime that `reference_for` names; report: of its
    evaluation; input_type: of the images that the first segment takes, a key of
    `early_exit.manifest.INPUTS`.

    Raises UserError for a run whose preparation of images cannot be written down, or if the files
    do not compute what the run does; nothing is written then.
    """
    try:
        facts = facts_of(report)
    except (KeyError, TypeError):
        raise UserError("the report is of another version; evaluate the run again") from None
    runtime = runtime_for(**facts["chosen_in"])
    package, precision = split_name(runtime)
    policy, image_input = classifier.policy, describe_input(classifier, input_type)
    # in int8 as in the evaluation; else float32, also for a runtime that computes in less
    built = classifier.runtime
    if runtime not in INTEGERS:
        built = in_runtime(classifier.loaded, None, package)
    models = export(built, policy, image_input)
    check = compare(classifier, built, models, image_input)
    segments = tuple(
        SegmentFile(f"segment{index}.onnx", hashlib.sha256(model).hexdigest(), first, last)
        for index, (model, (first, last)) in enumerate(
            zip(models, spans(policy.enabled), strict=True)
        )
    )
    manifest = Manifest(
        classes=classifier.classes,
        input=image_input,
        cost=classifier.cost,
        criterion=policy.criterion,
        traits=traits_of(policy, len(classifier.classes)),
        runtime=runtime,
        precision=precision,
        opset=OPSET,
        segments=segments,
        check=check,
        versions=_versions(runtime),
        **facts,
    )
    for segment, model in zip(segments, models, strict=True):
        write_bytes(directory / segment.file, model)
    if facts["chosen_in"]["precision"] != computes_in(runtime):
        policy = dataclasses.replace(policy, guarantee=None)  # it holds for what was evaluated
    policy.save(directory / "policy.yaml")
    write_text(directory / NAME, manifest.to_json())
    return manifest


def _versions(runtime: str) -> dict[str, str]:
    """The versions of the packages that write models for a runtime."""
    packages = (split_name(runtime)[0], *NEEDED_TO_BUILD[runtime])
    own = {name: import_package(name).__version__ for name in packages}
    return {"early-exit": early_exit.__version__, **versions(), **own}


def reference_for(report: dict[str, Any]) -> str:
    """The runtime that the files are compared with: eager torch or, if the evaluation was made in
    8-bit integers, its own, because the quantised network is another one.

    Raises KeyError or TypeError for a report that does not say.
    """
    name = report["environment"].get("runtime", "torch")
    return name if name in INTEGERS else "torch"


def facts_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says from the report: fields of `Manifest`. Raises KeyError or TypeError
    for a report that lacks it."""
    environment, test = report["environment"], report["test"]
    return {
        "network": {name: report["run"][name] for name in ("arch", "dataset", "weights")},
        "chosen_in": {
            "runtime": environment.get("runtime", "torch"),
            "precision": environment["precision"],
        },
        "test": {
            "images": report["choice"]["test_images"],
            "accuracy": test["accuracy"],
            "macs_share": test["macs_share"],
            "final_accuracy": report["final_accuracy"],
        },
        "val": {
            "thresholds": [row["threshold"] for row in report["exits"][:-1]],
            "temperatures": [row["temperature"] for row in report["exits"]],
            **report["val"],
            "exit_shares": report.get("val_shares") or None,  # older reports have none
            "images": report["choice"]["val_images"],
        },
        "val_curve": [
            {"threshold": row["threshold"], **row["val"], "exit_shares": row["val_shares"]}
            for row in report["curve"]
        ],
    }


def traits_of(policy: Policy, num_classes: int) -> Traits:
    """The properties of the criterion for a number of classes and the policy's exits."""
    traits = get_traits(policy.criterion)
    lowest, highest = traits.range(num_classes, sum(policy.enabled))
    return dataclasses.replace(traits, lowest=lowest, highest=highest)


def runtime_for(runtime: str, precision: str) -> str:
    """The runtime to deploy to: that in which the thresholds were chosen, or else ONNX Runtime.

    runtime, precision: in which they were chosen, as a report says. Logs a warning if it computes
    in another precision.
    """
    deployed = runtime if runtime in DEPLOYABLE else "onnxruntime"
    computed = computes_in(deployed)
    if precision != computed:
        log.warning(
            "the thresholds were chosen in %s, the deployed model computes in %s: evaluate the run"
            " in that precision for the accuracy that it has there",
            precision,
            computed,
        )
    return deployed


def describe_input(classifier: Classifier, input_type: str) -> ImageInput:
    """The images that the network takes and how they are prepared. Raises UserError for a task with
    a preparation of its own, which needs the task's code."""
    loaded, prepare = classifier.loaded, classifier.task.prepare
    crop = None
    from early_exit.data import folders  # imports torchvision

    if prepare is folders.prepare:
        data: Any = loaded.config.data
        crop = CentreCrop(data.val_resize, data.val_crop)
    elif prepare is not None:
        raise UserError(
            f"the task prepares images with {getattr(prepare, '__name__', prepare)}, which a"
            " deployed model does not have; a task that is exported uses"
            " early_exit.data.folders.prepare or the default"
        )
    channels, height, width = loaded.network.image_shape
    return ImageInput(
        type=input_type,
        shape=(channels, height, width),
        mean=tuple(loaded.normalisation["mean"]),
        std=tuple(loaded.normalisation["std"]),
        crop=crop,
    )


def check_images(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Images (64, C, H, W) uint8 of noise, whose contrast rises from none to all of the range."""
    rng = np.random.default_rng(seed)
    contrast = np.linspace(0, 1, IMAGES).reshape(-1, 1, 1, 1)
    noise = rng.uniform(-1, 1, (IMAGES, *shape))
    level = 127.5 + (1 - contrast) * rng.uniform(-127.5, 127.5, (IMAGES, 1, 1, 1))
    return np.clip(np.round(level + 127.5 * contrast * noise), 0, 255).astype(np.uint8)


def export(network: RuntimeNetwork, policy: Policy, image_input: ImageInput) -> list[bytes]:
    """The ONNX model of every segment under the policy, in int8 if the runtime is.

    network: in ONNX Runtime or OpenVINO.
    """
    runtime: Any = network.runtime
    models = []
    for first, last in spans(policy.enabled):
        scaled = first == 0 and image_input.type == "uint8"
        scale = (image_input.mean, image_input.std) if scaled else None
        segment = segment_of(network.network, first, last, policy.criterion)
        with plain_tensors():
            models.append(
                runtime.model(segment, network.example_of(first, policy.criterion), scale)
            )
    return models


def compare(
    classifier: Classifier,
    built: RuntimeNetwork,
    models: Sequence[bytes],
    image_input: ImageInput,
) -> dict[str, Any]:
    """Compares models with the run, and returns what the manifest says of it.

    built: the network in the runtime of the models. Raises UserError if they differ by more than
    rounding.
    """
    reference, policy = classifier.runtime, classifier.policy
    runtime: Any = built.runtime
    mean, std = image_input.mean, image_input.std
    if runtime.precision == "int8":
        of = "train"  # noise has values beyond the ranges, which are cut off
        pixels = pixels_of(reference.example[:IMAGES], mean, std).contiguous().numpy()
    else:
        of = "noise"
        pixels = check_images(image_input.shape)
    layout = classifier.loaded.config.run.memory_format
    ends = [last for _, last in spans(policy.enabled)]
    agreement = check_segments(
        reference,
        policy,
        [(last, runtime.load(model)) for last, model in zip(ends, models, strict=True)],
        normalise(torch.from_numpy(pixels), mean, std, layout),
        image_input.array(pixels),
    )
    return {
        "runtime": runtime.name,
        "compared_with": reference.runtime.name,
        "images_of": of,
        **vars(agreement),
    }


def computes_in(runtime: str) -> str:
    """The precision of a runtime, as reports name it."""
    return PRECISIONS[split_name(runtime)[1]]


def notes(manifest: Manifest, guaranteed: bool = False) -> list[str]:
    """Paragraphs of the card on what the directory holds and needs, in Markdown.

    guaranteed: whether the evaluation gave a guarantee.
    """
    chosen, count = manifest.chosen_in, len(manifest.segments)
    lost = []
    if guaranteed and chosen["precision"] != computes_in(manifest.runtime):
        lost = [
            f"The guarantee of the evaluation holds in {chosen['precision']} and is not part of"
            f" this model, which computes in {computes_in(manifest.runtime)}."
        ]
    return [
        f"{count} ONNX file{'s' if count > 1 else ''} (opset {manifest.opset}), one per segment,"
        f" for {manifest.runtime}. The first takes images of {manifest.input.type}"
        f" (B, {', '.join(map(str, manifest.input.shape))})"
        + (", and normalises them." if manifest.input.type == "uint8" else ", normalised.")
        + f" {_checked(manifest)} The accuracy above was measured in {chosen['runtime']},"
        f" {chosen['precision']}.",
        "The thresholds in `policy.yaml` can be changed; `val_curve` in `model.json` lists"
        " thresholds with their accuracy and cost on val. Which exits are enabled is fixed.",
        "No torch is needed: `pip install numpy pillow pyyaml"
        f" {split_name(manifest.runtime)[0]}` and `pip install --no-deps CHECKOUT`, where CHECKOUT"
        " is a checkout of early-exit.",
        *lost,
    ]


def _checked(manifest: Manifest) -> str:
    """What was compared when the files were written, in sentences."""
    check = manifest.check
    largest = (
        f"{check['largest_difference']:.1g} of the largest one ({check['tolerance']:.1g} is allowed"
        " for rounding)"
    )
    if manifest.runtime not in INTEGERS:
        return (
            f"On {check['images']} images of noise, computed in float32 by {check['runtime']},"
            f" their logits differ from torch's by at most {largest}."
        )
    return (
        f"They compute in 8-bit integers, with scales for {manifest.runtime} alone: another runtime"
        f" gives other answers. On {check['images']} images of train, their logits differ from"
        f" those of the evaluation's own segments by at most {largest}, and these from torch's in"
        f" float32 by at most {check['from_float']:.1g}."
    )
