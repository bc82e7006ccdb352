"""A trained run and its policy, ready to classify one's own images.

    from early_exit.classifier import load
    classify = load("runs/mine")
    print(classify(["photo.jpg"]))

Who leaves where is decided by the policy that an evaluation of the run has chosen.
"""

import dataclasses
import importlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from early_exit import config as configs
from early_exit.cost import Cost, network_cost
from early_exit.errors import UserError
from early_exit.experiment import FrontDoor, layout
from early_exit.inference import Answers, infer
from early_exit.pixels import as_bytes, as_rgb, fitted, normalise
from early_exit.policy import Policy
from early_exit.trained import Loaded, evaluations, load_network, refuse_missing

USUAL = "max-drop-0.5-max_prob"  # the evaluation that is taken where there are several


@dataclass(frozen=True)
class Prediction:
    """What was answered for one image."""

    name: str
    """Of the class."""
    class_index: int
    confidence: float
    """Probability of that class at the exit that answered, its temperature applied."""
    exit: str
    exit_index: int
    macs: int
    """Multiply-adds that were computed for it."""
    macs_share: float
    """Of the plain network's; over 1 at the final exit, because the heads were computed too."""


@dataclass(frozen=True)
class Classifier:
    """Classifies images, exits taken. Call it with paths of files or images of PIL."""

    loaded: Loaded
    door: FrontDoor
    policy: Policy
    cost: Cost

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the logits."""
        return self.loaded.classes

    def __call__(
        self, images: Sequence[str | Path | Image.Image], batch_size: int = 64
    ) -> list[Prediction]:
        """The predictions, in the order of the images.

        Raises UserError for a file that cannot be read as an image.
        """
        found: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            batch = torch.stack([self.read(image) for image in images[start : start + batch_size]])
            found += self.predictions(batch)
        return found

    def read(self, image: str | Path | Image.Image) -> Tensor:
        """One image as the network wants it, (C, H, W) uint8: turned upright as its EXIF data say,
        cut and resized as in an evaluation.

        Raises UserError for a file that cannot be read as an image.
        """
        try:
            if isinstance(image, str | Path):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                    with Image.open(image) as file:
                        file.load()
                picture = file
            else:
                picture = image
            picture = as_rgb(ImageOps.exif_transpose(picture))
        except Exception as error:  # what bytes of another kind make of a decoder has no bounds
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            if isinstance(error, IsADirectoryError):
                reason = "a folder without images"
            raise UserError(
                f"{image} cannot be read as an image ({reason or type(error).__name__})"
            ) from None
        shape = self.loaded.network.image_shape
        if self.door.held_out:
            picture = self.door.held_out(self.loaded.config, picture)
        else:
            picture = fitted(picture, shape)
        return as_bytes(picture, shape[0])

    def answer(self, images: Tensor) -> Answers:
        """What the network answers for images (B, C, H, W) uint8 of its own size."""
        loaded = self.loaded
        mean, std = (loaded.normalisation[name] for name in ("mean", "std"))
        images = normalise(images.to(loaded.device), mean, std, layout(loaded.config))
        return infer(loaded.network, images, self.policy, loaded.autocast)

    def predictions(self, images: Tensor) -> list[Prediction]:
        """`answer` with names and costs."""
        answers = self.answer(images)
        sure, classes = answers.logits.softmax(dim=-1).max(dim=-1)
        names, policy = self.loaded.classes, self.policy
        macs, shares = (cost(policy.enabled) for cost in (self.cost.cumulative, self.cost.shares))
        return [
            Prediction(names[index], index, confidence, policy.exit_names[at], at, macs[at],
                       shares[at])
            for index, confidence, at in zip(
                classes.tolist(), sure.tolist(), answers.exit_index.tolist(), strict=True
            )
        ]


def load(
    run: str | Path,
    evaluation: str | None = None,
    *,
    door: FrontDoor | None = None,
    device: str = "auto",
    overrides: dict[str, Any] | None = None,
) -> Classifier:
    """The network of a run directory and the policy that an evaluation of it chose.

    run: the run directory, or that of the evaluation. evaluation: its name; absent: the only one,
    or the one of `--max-drop 0.5`. door: the run's front door, for one that has no name.
    overrides: settings that are changed, nested, as in a preset.
    """
    directory = evaluation_directory(Path(run), evaluation)
    report = read_report(directory)
    if not report.get("door") and door is None:
        raise UserError(
            f"{directory} does not say how its network is built; evaluate the run again, or from"
            " Python: load(run, door=...)"
        )
    merged = configs.merge({"run": {"device": device}}, overrides or {})
    door = door or find_door(report["door"])  # which may bring a criterion of its own
    policy = Policy.load(directory / "policy.yaml")
    loaded = load_network(directory.parent.parent, door, merged)
    if report["weights"] != loaded.weights:
        raise UserError(
            f"the policy in {directory} was chosen for {report['weights']}, and the run now has"
            f" {loaded.weights}; evaluate it again"
        )
    if loaded.network.exit_names != policy.exit_names:
        raise UserError(
            f"the policy in {directory} is for exits {', '.join(policy.exit_names)}, the network"
            f" has {', '.join(loaded.network.exit_names)}; evaluate the run again"
        )
    cost = network_cost(loaded.network)
    if loaded.config.run.compile:
        loaded.network.compile_stages()
    if loaded.device.type == "cuda":  # what the evaluation chose by: float32 means float32
        torch.backends.cudnn.allow_tf32 = loaded.precision != "off"
    return Classifier(loaded, door, policy, cost)


def evaluation_directory(run: Path, name: str | None = None) -> Path:
    """Where the evaluation lies: `run` itself if it is one, or that of a run directory."""
    if (run / "policy.yaml").is_file():
        if name is not None:
            raise UserError(f"{run} is an evaluation already; leave out --eval {name}")
        return run.absolute()
    refuse_missing(run)
    names = list(evaluations(run, "policy.yaml"))
    if not names:
        raise UserError(
            f"{run} has no policy yet: the eval.py beside its trainer chooses one"
        )
    wanted = name or (names[0] if len(names) == 1 else USUAL)
    if wanted not in names:
        which = f"no evaluation {name}" if name else "several evaluations"
        raise UserError(f"{run} has {which}; name one with --eval: {', '.join(names)}")
    return (run / "eval" / wanted).absolute()


def find_door(name: str) -> FrontDoor:
    """The front door called `package.module:NAME`."""
    module, _, attribute = name.partition(":")
    try:
        door = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"the run was made by {name}, which cannot be imported here ({error})"
        ) from None
    if not isinstance(door, FrontDoor):
        raise UserError(f"the run was made by {name}, which is no front door of this program")
    return door


def read_report(directory: Path) -> dict[str, Any]:
    """The evaluation's numbers."""
    path = directory / "report.json"
    try:
        report = json.loads(path.read_text())
        if isinstance(report, dict) and "weights" in report:
            return report
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        pass
    raise UserError(f"{path} is torn or another file; evaluate the run again")


def images_in(names: Iterable[str | Path]) -> Iterable[Path]:
    """Files as they are named, and for a folder the images below it, in order, or the folder itself
    where there are none."""
    formats = Image.registered_extensions()
    read = {suffix for suffix, kind in formats.items() if kind in Image.OPEN}
    for name in names:
        path = Path(name)
        if not path.is_dir():
            yield path
            continue
        inside = [
            file for file in sorted(path.rglob("*"))
            if file.suffix.lower() in read and file.is_file()
        ]
        yield from inside or [path]  # which cannot be read, and is named


def as_json(name: Path, prediction: Prediction) -> str:
    """One line of JSON."""
    values = dataclasses.asdict(prediction)
    return json.dumps({"image": str(name), "class": values.pop("name"), **values})
