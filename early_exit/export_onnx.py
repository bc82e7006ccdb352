"""Writes a run as a deployed model: one ONNX file per segment, the policy and the manifest.

`early_exit.deployed` reads it, without torch. The files are compared with torch before they are
written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

import early_exit
from early_exit.classifier import Classifier
from early_exit.data.pixels import normalise
from early_exit.deployed import RUNTIMES
from early_exit.errors import UserError
from early_exit.inference.criteria import Traits, get_traits
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.base import Example
from early_exit.inference.runtimes.onnx_check import check_segments
from early_exit.inference.runtimes.onnx_export import OPSET, export_segment
from early_exit.inference.runtimes.packages import import_package
from early_exit.inference.runtimes.table import find_runtime
from early_exit.inference.segments import segments_of, spans
from early_exit.manifest import NAME, CentreCrop, ImageInput, Manifest, SegmentFile
from early_exit.system.device import PRECISIONS
from early_exit.system.files import write_bytes, write_text
from early_exit.system.provenance import versions

log = logging.getLogger(__name__)

IMAGES = 64  # that the files are checked with


def write(
    directory: Path, classifier: Classifier, report: dict[str, Any], input_type: str = "uint8"
) -> Manifest:
    """Writes a run into a new directory, and returns the manifest.

    classifier: the run, on the CPU in float32; report: of its evaluation; input_type: of the images
    that the first segment takes, a key of `early_exit.manifest.INPUTS`.

    Raises UserError for a run whose preparation of images cannot be written down, or if the files
    do not compute what torch does; nothing is written then.
    """
    try:
        facts = facts_of(report)
    except (KeyError, TypeError):
        raise UserError("the report is of another version; evaluate the run again") from None
    runtime = runtime_for(**facts["chosen_in"])
    image_input = describe_input(classifier, input_type)
    pixels = check_images(image_input.shape)
    normalised = normalise(
        torch.from_numpy(pixels),
        image_input.mean,
        image_input.std,
        classifier.loaded.config.run.memory_format,
    )
    models = export(classifier, normalised, image_input)
    # the files are what is checked: in float32, also for a runtime that computes in less
    checked_in = RUNTIMES[runtime][0]
    loader: Any = find_runtime(checked_in)
    ends = [last for _, last in spans(classifier.policy.enabled)]
    agreement = check_segments(
        classifier.loaded.network,
        classifier.policy,
        [(last, loader.load(model)) for last, model in zip(ends, models, strict=True)],
        normalised,
        image_input.array(pixels),
    )
    segments = tuple(
        SegmentFile(f"segment{index}.onnx", hashlib.sha256(model).hexdigest(), first, last)
        for index, (model, (first, last)) in enumerate(
            zip(models, spans(classifier.policy.enabled), strict=True)
        )
    )
    manifest = Manifest(
        classes=classifier.classes,
        input=image_input,
        cost=classifier.cost,
        criterion=classifier.policy.criterion,
        traits=traits_of(classifier.policy, len(classifier.classes)),
        runtime=runtime,
        precision=RUNTIMES[runtime][1],
        opset=OPSET,
        segments=segments,
        check={"runtime": checked_in, **vars(agreement)},
        versions={
            "early-exit": early_exit.__version__,
            **versions(),
            **{name: import_package(name).__version__ for name in (checked_in, "onnxscript")},
        },
        **facts,
    )
    for segment, model in zip(segments, models, strict=True):
        write_bytes(directory / segment.file, model)
    classifier.policy.save(directory / "policy.yaml")
    write_text(directory / NAME, manifest.to_json())
    return manifest


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
        "val_curve": [{"threshold": row["threshold"], **row["val"]} for row in report["curve"]],
    }


def traits_of(policy: Policy, num_classes: int) -> Traits:
    """The properties of the criterion for a number of classes and the policy's exits."""
    traits = get_traits(policy.criterion)
    lowest, highest = traits.range(num_classes, sum(policy.enabled))
    return dataclasses.replace(traits, lowest=lowest, highest=highest)


def runtime_for(runtime: str, precision: str) -> str:
    """The runtime to deploy to: that in which the thresholds were chosen, or else ONNX Runtime.

    runtime, precision: in which they were chosen, as a report says.
    Logs a warning if it computes in another precision. Raises UserError for integers, because the
    segments are exported in float32.
    """
    if "int8" in runtime:
        raise UserError(
            f"the policy was chosen in {runtime}, and int8 segments cannot be exported; evaluate"
            " the run with another --runtime"
        )
    deployed = runtime if runtime in RUNTIMES else "onnxruntime"
    computed = PRECISIONS[RUNTIMES[deployed][1]]
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


def export(classifier: Classifier, images: torch.Tensor, image_input: ImageInput) -> list[bytes]:
    """The ONNX model of every segment under the policy. images: normalised, to trace with."""
    scale = (image_input.mean, image_input.std) if image_input.type == "uint8" else None
    features: Any = images[:2]
    state, models = None, []
    with torch.no_grad():
        for _, segment in segments_of(classifier.loaded.network, classifier.policy):
            example = Example(features, state)
            models.append(export_segment(segment, example, scale if segment.is_first else None))
            features, _, _, _, state = segment(features, 1.0, state)
    return models


def notes(manifest: Manifest) -> list[str]:
    """Paragraphs of the card on what the directory holds and needs, in Markdown."""
    check, chosen = manifest.check, manifest.chosen_in
    count = len(manifest.segments)
    return [
        f"{count} ONNX file{'s' if count > 1 else ''} (opset {manifest.opset}), one per segment,"
        f" for {manifest.runtime}. The first takes images of {manifest.input.type}"
        f" (B, {', '.join(map(str, manifest.input.shape))})"
        + (", and normalises them." if manifest.input.type == "uint8" else ", normalised.")
        + f" On {check['images']} images of noise, computed in float32 by {check['runtime']}, their"
        " logits differ from torch's by at most"
        f" {check['largest_difference']:.0e} of the largest one ({check['tolerance']:.0e} is"
        f" allowed for rounding). The accuracy above was measured in {chosen['runtime']},"
        f" {chosen['precision']}.",
        "The thresholds in `policy.yaml` can be changed; `val_curve` in `model.json` lists"
        " thresholds with their accuracy and cost on val. Which exits are enabled is fixed.",
        "No torch is needed: `pip install numpy pillow pyyaml"
        f" {RUNTIMES[manifest.runtime][0]}` and `pip install --no-deps early-exit`.",
    ]
