"""A deployed model: classifies images with ONNX Runtime or OpenVINO, without torch.

    python -m early_exit.export runs/mine models/mine --format onnx
    python -m early_exit.predict models/mine photo.jpg

Needs numpy, Pillow, PyYAML and one of the packages onnxruntime and openvino.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from early_exit.data.decoding import ImageSource, read_image
from early_exit.errors import UserError
from early_exit.inference.criteria import CRITERIA, declare
from early_exit.inference.infer import Answers, RunSegment, run_segments
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.table import find_runtime
from early_exit.manifest import Manifest, SegmentFile
from early_exit.model.macs import Cost
from early_exit.prediction import Prediction, classify, make_predictions

log = logging.getLogger(__name__)

RUNTIMES = {
    "onnxruntime": ("onnxruntime", "f32"),
    "openvino": ("openvino", "f32"),
    "openvino-bf16": ("openvino", "bf16"),
}
"""Runtimes that run exported segments: the package and the precision of each."""


@dataclass(frozen=True)
class DeployedClassifier:
    """Classifies images with exits taken. Call it with paths of files or PIL images."""

    manifest: Manifest
    policy: Policy
    segments: Sequence[tuple[int, RunSegment]]
    """Each with the index of the exit that it ends at."""
    runtime: str
    """The runtime that they were loaded in, a key of `RUNTIMES`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.manifest.classes

    @property
    def cost(self) -> Cost:
        """Of every stage and head."""
        return self.manifest.cost

    def __call__(self, images: Sequence[ImageSource], batch_size: int = 64) -> list[Prediction]:
        """The predictions, in the order of the images.

        Raises UserError for a file that cannot be read as an image.
        """
        return classify(self, images, batch_size)

    def read(self, image: ImageSource) -> np.ndarray:
        """One image as the network takes it, (C, H, W) uint8: decoded, cropped and resized as in an
        evaluation.

        Raises UserError for a file that cannot be read as an image.
        """
        return self.manifest.input.read(read_image(image))

    def answer(self, images: np.ndarray) -> Answers:
        """The network's answers for images (B, C, H, W) uint8 of its own size, B at least 1.

        Raises UserError for images of another type or size.
        """
        shape = self.manifest.input.shape
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise UserError(
                f"the images are {images.dtype} {images.shape}; expected uint8 of (B,"
                f" {', '.join(map(str, shape))}), B at least 1"
            )
        return run_segments(self.segments, self.manifest.input.array(images), self.policy)

    def predict(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """The predictions for what `read` gave."""
        answers = self.answer(np.stack(images))
        best = answers.logits.max(axis=1, keepdims=True)
        confidence = 1 / np.exp(answers.logits - best).sum(axis=1)  # of the softmax
        return make_predictions(
            self, answers.classes.tolist(), confidence.tolist(), answers.exit_index.tolist()
        )


def load(
    directory: str | Path, runtime: str | None = None, threads: int | None = None
) -> DeployedClassifier:
    """A deployed model.

    runtime: a key of `RUNTIMES`; default: the model's own or, if its package is not installed,
    another one of the same precision. threads: of the CPU; default: one per core. In ONNX Runtime
    the threads of the first model that is loaded are those of the whole process.

    Raises UserError if a file is missing or was changed, if the policy is not for these files, or
    if no runtime is installed. The thresholds and temperatures of `policy.yaml` may be changed.
    """
    directory = Path(directory)
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    manifest = Manifest.read(directory)
    _declare_criterion(manifest)
    policy = Policy.load(directory / "policy.yaml")
    manifest.check_policy(policy, directory / "policy.yaml")
    name = choose_runtime(manifest, runtime)
    loader: Any = find_runtime(name, threads=threads)
    segments = [
        (segment.last, _loaded(directory, segment, loader)) for segment in manifest.segments
    ]
    return DeployedClassifier(manifest, policy, segments, name)


def choose_runtime(manifest: Manifest, wanted: str | None) -> str:
    """The runtime to use, whose package is installed. Raises UserError if there is none."""
    own = manifest.runtime
    for name in (own, wanted or own):
        if name not in RUNTIMES:
            raise UserError(
                f"there is no runtime {name!r} for deployed models; choose one of"
                f" {', '.join(RUNTIMES)}"
            )
    precision = manifest.precision
    if wanted and RUNTIMES[wanted][1] != precision:
        log.warning(
            "%s computes in %s; the model is for %s", wanted, RUNTIMES[wanted][1], precision
        )
    name = wanted or own
    others = [other for other, (_, same) in RUNTIMES.items() if same == precision]
    installed = [other for other in (name, *others) if _is_installed(RUNTIMES[other][0])]
    if name in installed:
        return name
    if wanted or not installed:
        package = RUNTIMES[name][0]
        raise UserError(f"the package {package} is not installed; run: pip install {package}")
    log.warning("%s is not installed; %s is used instead", RUNTIMES[name][0], installed[0])
    return installed[0]


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _loaded(directory: Path, segment: SegmentFile, runtime: Any) -> RunSegment:
    """A segment from its file. Raises UserError if the file is not the one that was written."""
    path = directory / segment.file
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); copy the whole directory again"
        ) from None
    if hashlib.sha256(model).hexdigest() != segment.sha256:
        raise UserError(f"{path} is damaged or was changed; copy the directory again")
    try:
        return runtime.load(model)
    except UserError:
        raise
    except Exception as error:  # the packages have error types of their own
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be loaded by {runtime.name} ({reason[:300]})") from None


def _declare_criterion(manifest: Manifest) -> None:
    """Makes a criterion known by its properties if this process has none of its name. The segments
    contain the criterion itself."""

    @declare(**vars(manifest.traits))
    def in_the_segments(_logits: Any, _state: Any = None) -> Any:
        raise UserError(
            f"this program knows the criterion {manifest.criterion} from a deployed model only; add"
            " it to early_exit.inference.criteria.CRITERIA"
        )

    CRITERIA.setdefault(manifest.criterion, in_the_segments)
