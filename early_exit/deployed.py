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
from early_exit.inference.runtimes.table import DEPLOYABLE, INTEGERS, find_runtime, split_name
from early_exit.manifest import Manifest, SegmentFile
from early_exit.prediction import ImageClassifier, Prediction, check_bytes

log = logging.getLogger(__name__)

_declared: set[str] = set()  # the criteria that only deployed models have brought


@dataclass(frozen=True)
class DeployedClassifier(ImageClassifier):
    """Classifies images with exits taken. Call it with paths of files or PIL images."""

    manifest: Manifest
    segments: Sequence[tuple[int, RunSegment]]
    """Each with the index of the exit that it ends at."""
    runtime: str
    """The name of the runtime that they were loaded in."""

    def read(self, image: ImageSource) -> np.ndarray:
        """See `ImageClassifier`."""
        return self.manifest.input.read(read_image(image))

    def answer(self, images: np.ndarray) -> Answers:
        """The network's answers for images (B, C, H, W) uint8 of its own size, B at least 1.

        Raises UserError for images of another type or size.
        """
        images = np.asarray(images)
        check_bytes(images, self.manifest.input.shape)
        return run_segments(self.segments, self.manifest.input.array(images), self.policy)

    def predict(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """The predictions for what `read` gave."""
        answers = self.answer(np.stack(images))
        return self.predictions_of(answers.logits, answers.exit_index)

    def predictions_of(self, logits: np.ndarray, exit_index: np.ndarray) -> list[Prediction]:
        """The predictions for the answers (B, K) and the exits taken (B,), as in `Answers`."""
        classes = logits.argmax(-1).tolist()
        return self.predictions(classes, confidence_of(logits).tolist(), exit_index.tolist())


def confidence_of(logits: np.ndarray) -> np.ndarray:
    """The probability (B,) of the class answered, for the logits (B, K) of the answers."""
    best = logits.max(axis=1, keepdims=True)
    return 1 / np.exp(logits - best).sum(axis=1)  # of the softmax


def load_policy(directory: Path, manifest: Manifest) -> Policy:
    """The policy of a deployed model. Raises UserError if it cannot be read or is not for these
    files."""
    path = directory / "policy.yaml"
    policy = Policy.load(path)
    manifest.check_policy(policy, path)
    return policy


def load(
    directory: str | Path, runtime: str | None = None, threads: int | None = None
) -> DeployedClassifier:
    """A deployed model.

    runtime: one of `early_exit.inference.runtimes.table.DEPLOYABLE`; default: the model's own or,
    if its package is not installed, another one of the same precision. A model in 8-bit integers
    runs in its own alone. threads: of the CPU; default: one per core. In ONNX Runtime the threads
    of the first model that is loaded are those of the whole process.

    Raises UserError if a file is missing or was changed, if the policy is not for these files, or
    if no runtime is installed. The thresholds and temperatures of `policy.yaml` may be changed.
    """
    directory = Path(directory)
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    manifest = Manifest.read(directory)
    _declare_criterion(manifest)
    policy = load_policy(directory, manifest)
    name = choose_runtime(manifest.runtime, runtime)
    loader: Any = find_runtime(name, threads=threads)
    segments = [
        (segment.last, _loaded(directory, segment, loader)) for segment in manifest.segments
    ]
    return DeployedClassifier(manifest.classes, policy, manifest.cost, manifest, segments, name)


def choose_runtime(own: str, wanted: str | None) -> str:
    """The runtime to use, whose package is installed. own: that which the model was made for.

    Raises UserError if there is none, and for another one than the model's own if one of the two is
    in 8-bit integers.
    """
    name = wanted or own
    for known in (own, name):
        if known not in DEPLOYABLE:
            raise UserError(
                f"there is no runtime {known!r} for deployed models; choose one of"
                f" {', '.join(DEPLOYABLE)}"
            )
    if name != own and (name in INTEGERS or own in INTEGERS):
        raise UserError(
            f"the model was made for {own} and cannot run in {name}: a model in 8-bit integers is"
            " quantised for one runtime, and another one gives other answers; remove --runtime"
            f" {name}, or export an evaluation that was made with --runtime {name}"
        )
    package, precision = split_name(name)
    _, made_for = split_name(own)
    if precision != made_for:
        log.warning("%s computes in %s; the model is for %s", name, precision, made_for)
    others = [other for other in DEPLOYABLE if split_name(other)[1] == made_for]
    if wanted or own in INTEGERS:
        others = []
    for found in (name, *others):
        if _is_installed(split_name(found)[0]):
            if found != name:
                log.warning("%s is not installed; %s is used instead", package, found)
            return found
    raise UserError(
        f"the runtime {name} needs the package {package}, which is not installed; run: pip install"
        f" {package}"
    )


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
    """Makes a criterion known by its properties if this process has none of its name but from
    another deployed model. The segments contain the criterion itself."""

    @declare(**vars(manifest.traits))
    def in_the_segments(_logits: Any, _state: Any = None) -> Any:
        raise UserError(
            f"this program knows the criterion {manifest.criterion} from a deployed model only; add"
            " it to early_exit.inference.criteria.CRITERIA"
        )

    name = manifest.criterion
    if name not in CRITERIA or name in _declared:  # two models may differ in its range
        CRITERIA[name] = in_the_segments
        _declared.add(name)
