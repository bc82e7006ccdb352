"""A trained run and its policy, ready to classify images.

The policy that an evaluation of the run chose decides which image exits where. It is applied in the
runtime it was chosen in, because another one's scores differ by rounding. `early_exit.load`
(`early_exit.loading`) loads deployed models too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from early_exit import config as configs
from early_exit.choosing.record import ExitRecord
from early_exit.data.base import Data
from early_exit.data.decoding import ImageSource, read_image
from early_exit.data.pixels import as_bytes, fitted, normalise
from early_exit.errors import DataError, Unavailable, UserError
from early_exit.evaluation.runtimes import check_settings
from early_exit.evaluation.upgrade import read_report
from early_exit.inference.infer import Answers
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.runtimes.table import INTEGERS
from early_exit.manifest import refuse_deployed
from early_exit.model.cost import network_cost
from early_exit.output import source_run
from early_exit.prediction import ImageClassifier, Prediction, check_bytes
from early_exit.system.device import PRECISIONS, set_threads
from early_exit.system.directories import restore_all
from early_exit.task import Task, find_task, import_task
from early_exit.trained import (
    CUT_BY,
    HELD_OUT,
    Loaded,
    calibration_of,
    check_run_directory,
    evaluations,
    in_runtime,
    load_data,
    load_network,
    on_their_device,
    record_name,
)

DEFAULT_EVALUATION = "max-drop-0.5-max_prob"  # if there are several


@dataclass(frozen=True)
class Classifier(ImageClassifier):
    """Classifies images with exits taken. Call it with paths of files or PIL images."""

    loaded: Loaded
    task: Task
    runtime: RuntimeNetwork
    """The network in the runtime in which it answers."""

    def read(self, image: ImageSource) -> np.ndarray:
        """See `ImageClassifier`."""
        picture, shape = read_image(image), self.loaded.network.image_shape
        if self.task.prepare:
            picture = self.task.prepare(self.loaded.config, picture)
        else:
            picture = fitted(picture, shape)
        return as_bytes(picture, shape[0])

    def answer(self, images: Tensor | np.ndarray) -> Answers:
        """The network's answers for images (B, C, H, W) uint8 of its own size, B at least 1.

        Raises UserError for images of another type or size.
        """
        loaded = self.loaded
        if isinstance(images, np.ndarray):
            images = np.ascontiguousarray(images)  # a tensor has no negative strides
        images = torch.as_tensor(images)
        check_bytes(images, loaded.network.image_shape)
        mean, std = (loaded.normalisation[name] for name in ("mean", "std"))
        layout = loaded.config.run.memory_format
        images = normalise(images.to(loaded.device), mean, std, layout)
        found = self.runtime.infer(images, self.policy)
        return Answers(*map(torch.as_tensor, (found.logits, found.exit_index, found.score)))

    def predict(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """The predictions for what `read` gave."""
        answers = self.answer(torch.from_numpy(np.stack(images)))
        confidence, classes = answers.logits.softmax(dim=-1).max(dim=-1)
        return self.predictions(classes.tolist(), confidence.tolist(), answers.exit_index.tolist())


def load(
    run: str | Path,
    evaluation: str | None = None,
    *,
    task: Task | str | None = None,
    device: str = "auto",
    overrides: dict[str, Any] | None = None,
    runtime: str | None = None,
) -> Classifier:
    """The network of a run and the policy that an evaluation of it chose.

    run: the run directory, or the directory of the evaluation. evaluation: its name; default: the
    only one, or that of `--max-drop 0.5`. task: the run's task, or `package.module:NAME` of it;
    default: the one that the report names, if `early_exit.task.TASKS` has it. overrides: settings
    that are changed, nested as in a preset. runtime: a name of
    `early_exit.inference.runtimes.table`; default: the one in which the policy was chosen, or torch
    as the overrides say if they give a precision or compile it. One in 8-bit integers needs the
    run's data: images of train give the ranges of values.

    Loading never imports a module because a file of the run names it. Raises UserError if the run,
    its evaluation or its task cannot be found, if they do not belong together, if a runtime is
    named and the overrides give a precision or compile it, or if a policy that was chosen in 8-bit
    integers would be applied in another runtime.
    """
    check_settings((runtime,), overrides or {})
    directory = find_evaluation(Path(run), evaluation)
    report = read_report(directory / "report.json")
    run_info = report.get("run", {})
    weights = run_info.get("weights")
    if not isinstance(weights, str):
        raise UserError(
            f"{directory / 'report.json'} does not say which weights it is of; evaluate the run"
            " again with eval.py"
        )
    # first: the task may bring a criterion of its own
    task = task_of(run_info.get("task"), directory, task)
    policy = Policy.load(directory / "policy.yaml")
    merged = configs.merge({"run": {"device": device}}, overrides or {})
    runtime = _runtime_of(report, directory, runtime, merged["run"])
    merged = on_their_device(merged, [runtime])
    loaded = load_network(directory.parent.parent, task, merged, run_info.get("rounded_to"))
    set_threads(loaded.config.run.threads)  # what is compiled before would be compiled again
    if weights != loaded.weights:
        raise UserError(
            f"the policy in {directory} was chosen for {weights}, and the run now has"
            f" {loaded.weights}; evaluate it again"
        )
    policy.check_exits(loaded.network.exit_names, f"the network of {directory}")
    policy.check_thresholds(len(loaded.classes))
    if loaded.device.type == "cuda" and loaded.precision == "off":
        # float32 means float32, as in the evaluation; for the process, until it trains or evaluates
        torch.backends.cudnn.allow_tf32 = False
    running = _in_runtime(loaded, task, policy, runtime, directory, report)
    cost = network_cost(loaded.network)
    return Classifier(loaded.classes, policy, cost, loaded, task, running)


def _runtime_of(
    report: dict[str, Any], directory: Path, asked: str | None, settings: dict[str, Any]
) -> str | None:
    """The runtime to load the policy of an evaluation in; None: torch, as the settings say.

    report, directory: of the evaluation. asked, settings: the runtime that was asked for, and what
    is changed in the run's section `run`. Raises UserError if a policy that was chosen in 8-bit
    integers would be applied in another runtime.
    """
    chosen_in = report.get("environment", {}).get("runtime")
    if asked is None and not {"amp", "compile"} & settings.keys():
        return chosen_in
    given = report.get("choice", {}).get("policy_given")
    if chosen_in in INTEGERS and asked != chosen_in and not given:
        raise UserError(
            f"the policy of {directory} was chosen in {chosen_in}: its thresholds are for the"
            f" quantised network and cannot be applied in {asked or 'torch'}; leave out what names"
            " another runtime or precision (export: add --format onnx), or evaluate the run with"
            " --runtime torch"
        )
    return asked


def check_data_is_read(classifier: Classifier, overrides: dict[str, Any]) -> None:
    """Raises UserError if the overrides name the directory of the data and the classifier reads
    none: only 8-bit integers need images, of train."""
    runtime = classifier.runtime.runtime.name
    if "root" in overrides.get("data", {}) and runtime not in INTEGERS:
        raise UserError(
            f"--data has no effect: of the run only its weights are read in {runtime}; images of"
            " train are needed in 8-bit integers alone; remove it"
        )


def _in_runtime(
    loaded: Loaded,
    task: Task,
    policy: Policy,
    name: str | None,
    directory: Path,
    report: dict[str, Any],
) -> RuntimeNetwork:
    """The network in a runtime, the policy's segments built. directory, report: of the evaluation
    that chose the policy. Raises UserError if the runtime cannot be used here."""
    data = None
    try:
        if name and name in INTEGERS:
            data = _calibration_data(loaded, task, name, report)
        running = in_runtime(loaded, data, name)
        running.segments(policy)
    except UserError as error:
        exact = PRECISIONS["f32"]
        otherwise = "evaluate the run again with --runtime torch"
        if report.get("environment", {}).get("precision", exact) == exact:
            otherwise = "load it with --runtime torch, where scores differ by rounding"
        raise _of_the_same_code(error)(
            f"the policy of {directory} cannot be applied in {name or 'torch'}: {error}; or"
            f" {otherwise}"
        ) from None
    return running


def _of_the_same_code(error: UserError) -> type[UserError]:
    """The type of an error that says more than `error`: what may pass, may pass."""
    return Unavailable if isinstance(error, Unavailable) else UserError


def _calibration_data(loaded: Loaded, task: Task, runtime: str, report: dict[str, Any]) -> Data:
    """The data of a run, by whose train images the ranges of 8-bit integers are found, as in the
    evaluation of this report.

    Raises UserError if they are not here, or if train has other images than the record of test in
    this runtime, if the run has one.
    """
    try:
        data, _ = load_data(loaded, task, val_from_of(report))
    except UserError as error:
        elsewhere = (
            "; if they are elsewhere, pass --data DIR" if isinstance(error, DataError) else ""
        )
        raise _of_the_same_code(error)(
            f"8-bit integers need images of train, for the ranges of values: {error}{elsewhere}"
        ) from None
    for run in dict.fromkeys((loaded.run_dir, source_run(loaded.run_dir))):
        record = run / "records" / record_name("test", runtime, loaded.rounded_to)
        if record.is_dir() and ExitRecord.load(record).info.calibration != calibration_of(data):
            raise UserError(
                f"train has other images than those that gave {record} the ranges of values, or it"
                " is of another version;"
                " evaluate the run again"
            )
    return data


def val_from_of(report: dict[str, Any]) -> str:
    """Where the evaluation of a report took val from, as `early_exit.trained.load_run` takes it."""
    return "train" if report.get("choice", {}).get("val_from") == HELD_OUT else "test"


def reported_test(data: Data, report: dict[str, Any]) -> Data:
    """The data whose test has no image that chose the policy of a report. Raises UserError if the
    report does not say which these are."""
    if val_from_of(report) == "train":
        return data
    if report["choice"].get("left_out"):
        raise UserError("files of test were unreadable in the evaluation; evaluate the run again")
    seed = str(report.get("choice", {}).get("val_from")).removeprefix(CUT_BY)
    if not seed.isdecimal():
        raise UserError(f"the report does not say which half of test is val ({seed})")
    return data.cut_test(int(seed))


def task_of(name: Any, directory: Path, task: Task | str | None) -> Task:
    """The task of a run: the given one, or else that which the report in `directory` names.

    Raises UserError if it cannot be found.
    """
    if isinstance(task, Task):
        return task
    if task is not None:
        return import_task(task)
    if not name or not isinstance(name, str):
        raise UserError(
            f"{directory} does not name the task of its run; pass it: --task package.module:NAME,"
            " or load(run, task=...)"
        )
    return find_task(name)


def find_evaluation(run: Path, name: str | None = None) -> Path:
    """The directory of an evaluation: `run` itself if it is one, else that of a run directory."""
    refuse_deployed(run)
    if run.parent.name == "eval":
        restore_all(run.parent)
    if (run / "policy.yaml").is_file():
        if name is not None:
            raise UserError(f"{run} is an evaluation already; remove --eval {name}")
        return run.absolute()
    check_run_directory(run)
    names = list(evaluations(run, "policy.yaml"))
    if not names:
        raise UserError(
            f"{run} has no evaluation yet; run the eval.py beside its trainer on it,"
            " or name the directory that was given to its --out"
        )
    wanted = name or (names[0] if len(names) == 1 else DEFAULT_EVALUATION)
    if wanted not in names:
        which = f"no evaluation {name}" if name else "several evaluations"
        raise UserError(f"{run} has {which}; name one with --eval: {', '.join(names)}")
    return (run / "eval" / wanted).absolute()
