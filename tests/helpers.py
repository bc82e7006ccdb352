"""Helpers of the tests: bounds on rounding, what a message names, and running the scripts.

As a program it runs a script on a network and data that take no time:

    python tests/helpers.py SIGTERM 8 FLAGS      cifar10/trainer.py with that network and that data,
                                                 sent a signal before its ninth batch
    python tests/helpers.py none 0 FLAGS         the same, without a signal
    python tests/helpers.py SIGTERM@1 8 FLAGS    only the second of torchrun's processes is sent it
    python tests/helpers.py SIGTERM@up 8 FLAGS   the first one sends it to torchrun
    python tests/helpers.py SIGTERM 1 eval RUN   cifar10/eval.py, before its second held-out batch
    python tests/helpers.py help SCRIPT ...      what each script's --help prints, as JSON

With DOUBLE=1 in the environment the network and its training are computed in float64.
"""

import dataclasses
import errno
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cifar10 import data, resnet, trainer
from cifar10 import eval as evaluation
from early_exit import config as configs
from early_exit.choosing.goals import Goal, MaxDrop
from early_exit.choosing.outcome import Live, Outcome, apply_policy
from early_exit.choosing.record import ExitRecord
from early_exit.cli import border
from early_exit.config import (
    BackbonePhaseConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from early_exit.data import folders
from early_exit.data.folders import FolderConfig
from early_exit.errors import UserError
from early_exit.evaluation.evaluate import evaluate
from early_exit.inference.infer import Answers
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.eager import EagerRuntime
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.model.network import MultiExitNetwork
from early_exit.system import distributed, signals
from early_exit.task import Task
from early_exit.training import checkpoint
from early_exit.training.train import train

CPU_DEVICE = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
SIDE = 16
FOLDERS = ("ape", "bee", "cat")
CPU = {"run": {"amp": "off", "device": "cpu", "threads": 1}}  # how an evaluation uses the machine
# two epochs of six steps on one CPU thread, in float32
TINY = (
    "--dataset",
    "digits",
    "--epochs",
    "2",
    "-b",
    "8",
    "--lr",
    "0.05",
    "--amp",
    "off",
    "--device",
    "cpu",
    "--threads",
    "1",
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def assert_names(text: str, *values: object) -> None:
    """That a text names each value, and not as a part of a longer word or number. 1 is named by
    1.0, and 5 % by 5%."""
    for value in values:
        word = re.escape(str(value)).replace(r"\ ", r"\s*")
        whole = rf"(?<![\w.]){word}(?!\w)(?!\.0*[1-9])"
        assert re.search(whole, text, re.IGNORECASE), f"{value!r} is not named in {text!r}"


def require_precision(amp: str) -> None:
    """Skips the test if this processor cannot train in a precision."""
    skip_without(DTYPES[amp])


def bound(dtype: torch.dtype, terms: int) -> float:
    """The relative error of a result that `terms` numbers were added up for, one after the other.

    Every addition, multiplication or rounded function of it is off by at most half of the dtype's
    epsilon, so a chain of n of them by at most about n epsilon (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1), whatever their order. For a network count the terms of the
    sums along its longest path: a 3x3 convolution of 16 channels adds 144, and BatchNorm and ReLU
    count one each.
    """
    return terms * torch.finfo(dtype).eps


def assert_close(found: Tensor, expected: Tensor, terms: int) -> None:
    """The same value by two ways, each a chain of at most `terms` additions and products.

    The error is relative to the largest entry: a small one may be what remains when large ones
    cancel.
    """
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert expected.isfinite().all()
    limit = bound(found.dtype, terms) * float(expected.detach().abs().max())
    assert float((found - expected).detach().abs().max()) <= limit


def slowly(*values: int) -> list:
    """Values of a parameter that are tried among the slow tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@functools.cache
def missing(dtype: torch.dtype) -> str | None:
    """Why this processor cannot convolve and multiply in `dtype`, or None where it can: tried, not
    asked by name."""
    images = torch.ones(1, 1, 4, 4, dtype=dtype, requires_grad=True)
    kernel = torch.ones(1, 1, 3, 3, dtype=dtype, requires_grad=True)
    try:
        made = torch.nn.functional.conv2d(images, kernel).flatten(1)
        made = torch.nn.functional.linear(made, torch.ones(2, 4, dtype=dtype))
        made.float().sum().backward()
    except RuntimeError as error:
        return f"no {dtype} on this processor: {error}"
    # 4 * 9, and twice each of 4 pixels; perturbed outputs may be off, garbage is far away
    correct = ((made - 36).abs() < 18).all() and ((kernel.grad - 8).abs() < 4).all()
    return None if correct else f"{dtype} gives wrong results on this processor"


def skip_without(dtype: torch.dtype) -> None:
    """Skips the test on a processor without `dtype`, and says so."""
    if missing(dtype):
        pytest.skip(missing(dtype))


def tiny_network(config: Config, num_classes: int) -> MultiExitNetwork:
    """A CIFAR ResNet of one block a stage, whatever `model.arch` says."""
    model = config.model
    backbone = resnet.ResNet(1, num_classes)
    places = backbone.default_exits if model.exits is None else model.exits
    return MultiExitNetwork(
        backbone,
        backbone.units(),
        places,
        head=model.head,
        num_classes=num_classes,
        example=torch.zeros(1, 3, SIDE, SIDE),
    )


@functools.cache
def few_digits(split_seed: int, train: int = 48, val: int = 40, test: int = 60) -> data.Data:
    """The first digits of every split, 16x16."""
    whole, splits = data.load("digits", split_seed=split_seed), {}
    for name, size in (("train", train), ("val", val), ("test", test)):
        part = whole.splits[name].subset(np.arange(size))
        splits[name] = data.ImageSet(part.images[:, :, ::2, ::2].contiguous(), part.targets)
    return dataclasses.replace(whole, splits=splits)


def tiny_data(settings: DataConfig) -> data.Data:
    """What `few_digits` gives, whatever `settings.dataset` says."""
    return few_digits(settings.split_seed)


TASK = Task(tiny_network, tiny_data)


def tiny_run(
    directory: Path,
    task: Task,
    optim: OptimConfig | None = None,
    split_seed: int = 0,
    regime: str = "joint",
    **model: Any,
) -> Path:
    """A run of `task` in `directory`, on one CPU thread in float32: two epochs of six steps with
    two early exits by default. model: settings of the network."""
    config = Config(
        data=DataConfig(dataset="digits", split_seed=split_seed),
        model=ModelConfig(**{"arch": "resnet20", "exits": ("layer1", "layer2"), **model}),
        optim=optim or OptimConfig(epochs=2, batch_size=8, lr=0.05),
        run=RunConfig(regime=regime, amp="off", device="cpu", threads=1),
    )
    return train(config, task, runs=directory, run_dir=directory)


def train_tiny(directory: Path, *flags: object, task: Task = TASK) -> Path:
    """A run in `directory` that cifar10/trainer.py makes of TINY and these flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TASK", task)
        trainer.main([*TINY, "--save-dir", str(directory), *map(str, flags)])
    return directory


def mixed_config(**run: Any) -> Config:
    """A mixed run: one epoch of the backbone and two of everything, three steps each."""
    return Config(
        data=DataConfig(dataset="digits"),
        model=ModelConfig(arch="resnet20", exits=("layer1",)),
        optim=OptimConfig(epochs=2, batch_size=16, lr=0.05, schedule="cosine"),
        backbone_phase=BackbonePhaseConfig(epochs=1),
        run=RunConfig(**{"regime": "mixed", "amp": "off", "device": "cpu", "threads": 1, **run}),
    )


def resume_run(
    directory: Path, config: Config | None = None, task: Task = TASK, **options: Any
) -> Path:
    """Trains `mixed_config`, or another one, in `directory`, from its newest checkpoint on."""
    options = {"resume": "auto", **options}
    return train(config or mixed_config(), task, runs=directory, run_dir=directory, **options)


def read_journal(directory: Path) -> list[dict]:
    """The records of metrics.jsonl, which are strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def comparable_journal(directory: Path) -> list[dict]:
    """The records of a run without what depends on the machine's speed and memory."""
    return [
        {k: v for k, v in record.items() if "second" not in k and k != "peak_memory"}
        for record in read_journal(directory)
    ]


def tensors(value: object, name: str = "") -> dict[str, Tensor]:
    """Every tensor in nested dictionaries and lists, by its path."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = value.items()
    else:
        items = enumerate(value) if isinstance(value, list | tuple) else ()
    return {k: v for key, part in items for k, v in tensors(part, f"{name}/{key}").items()}


def assert_same_run(directory: Path, expected: Path) -> None:
    """That two finished runs have the same weights, momenta and journal, to the last bit."""
    found = checkpoint.newest(directory)[1]
    wanted = checkpoint.load(expected)
    for part in ("network", "optimizer"):
        ours, theirs = tensors(found[part]), tensors(wanted[part])
        assert ours and list(ours) == list(theirs)
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), f"{part}{name}"
    assert found["position"] == wanted["position"]
    assert comparable_journal(directory) == comparable_journal(expected)


def accuracy_bounds(directory: Path, split: str) -> dict[str, tuple[float, float]]:
    """Accuracy of every exit, one image after the other in float64, of the checkpoint in
    `directory`: the least and the most that float32 may make of it."""
    saved = checkpoint.load(directory)
    config = configs.build(Config, saved["config"])
    network = tiny_network(config, 10).eval()
    network.load_state_dict(saved["network"])
    network.double()
    part = few_digits(config.data.split_seed).splits[split]
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    # a logit is a sum of sums: of as many products as one path from the image has weights
    work = sum(p[0].numel() for p in network.parameters() if p.ndim > 1)
    least, most = (dict.fromkeys(network.exit_names, 0) for _ in range(2))
    with torch.no_grad():
        for image, target in zip(part.images, part.targets.tolist(), strict=True):
            outputs = network(((image.double() / 255 - mean) / std)[None])
            for name, (logits,) in zip(network.exit_names, outputs, strict=True):
                others = max(value for k, value in enumerate(logits) if k != target)
                ahead = logits[target] - others
                rounding = work * torch.finfo(torch.float32).eps * logits.abs().max()
                least[name] += bool(ahead > rounding)
                most[name] += bool(ahead >= -rounding)
    return {name: (least[name] / len(part), most[name] / len(part)) for name in least}


def assert_accuracy(found: dict[str, float], expected: dict[str, tuple[float, float]]) -> None:
    """That fractions lie within bounds, for the same exits."""
    assert list(found) == list(expected)
    for name, (least, most) in expected.items():
        assert most - least < 0.1  # or this would claim little
        assert least - 1e-6 <= found[name] <= most + 1e-6, name


def quick_report(
    run: Path | str, task: Task = TASK, goal: Goal | None = None, **options: Any
) -> dict[str, Any]:
    """The report of an evaluation as it is written, without latency and pictures unless options say
    otherwise."""
    options = {"overrides": CPU, "live": False, "draw": False, **options}
    _, directory = evaluate(run, task, goal or MaxDrop(0.01), **options)
    return json.loads((directory / "report.json").read_text())


def start(
    script: str,
    *arguments: object,
    cwd: Path,
    processes: int = 0,
    node: tuple[int, int] | None = None,
    alone: bool = False,
    inside: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen:
    """A script of the repository as a process of its own, on one thread; or torchrun with as many
    processes of it. node: its number of two, and the port where they meet. alone: in a group of its
    own, to be signalled as one. inside: a command that runs it."""
    where = ["--standalone"]
    if node:
        where = ["--nnodes=2", f"--node-rank={node[0]}", f"--master-port={node[1]}"]
        where.append("--master-addr=127.0.0.1")
    torchrun = ["-m", "torch.distributed.run", *where, f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [
            *inside,
            sys.executable,
            *(torchrun if processes else ()),
            str(ROOT / script),
            *map(str, arguments),
        ],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=alone,
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Waits for a started script and gives what it wrote."""
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()  # which a finished one does not mind
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """Returns the first true value of `condition`; fails where none came within the limit.

    what: the event, as in "the first checkpoint". The limit only ends a test that would never end.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"{what} did not come within {seconds} seconds")
        time.sleep(0.02)
    return value


def wait_for_file(path: Path, process: subprocess.Popen) -> None:
    """Waits until a running process has written a file; fails where the process ended before."""
    wait_for(lambda: path.exists() or process.poll() is not None, f"{path.name}")
    assert path.exists(), finish(process).stderr


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="looks at processes as Linux shows them"
)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def waits_for_a_child(pid: int) -> bool:
    """Whether a process is blocked until a child of its own ends. A kernel that hides where it is
    blocked shows 0; then it is enough that it sleeps."""
    blocked_in = Path(f"/proc/{pid}/wchan").read_text()
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return blocked_in == "do_wait" or (blocked_in == "0" and state == "S")


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped, as by SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def told_once(stderr: str, prog: str) -> str:
    """The one line that a script ends with, without its name. torchrun adds lines of its own; only
    one of its processes may print the line, which is then repeated at the end."""
    lines = [line for line in stderr.splitlines() if line.startswith(f"{prog}: ")]
    assert len(lines) == 1 or (lines == 2 * lines[:1] and stderr.endswith(f"{lines[0]}\n")), stderr
    return lines[0].removeprefix(f"{prog}: ")


def refusal(call, *arguments, **options) -> str:
    """The message of the UserError that a call ends in: one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def run_main(
    main: Callable, prog: str, monkeypatch, capsys, *arguments: object
) -> tuple[int, str, str]:
    """A script's `main` as its command line would run it, in this process: exit code, stdout and
    stderr."""
    monkeypatch.setattr(sys, "argv", [prog, *map(str, arguments)])
    capsys.readouterr()
    handlers = {number: signal.getsignal(number) for number in signals.STOPPING}
    code = 0
    try:
        border.run(main, prog)
    except SystemExit as ended:
        code = ended.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code or 0, *capsys.readouterr()


def at_batch(patch: Any, k: int, act: Callable[[], None], batches: str = "train_batches") -> None:
    """Calls `act` before the k'th batch from now on of training, or of `eval_batches`."""
    original, count = getattr(data.Data, batches), itertools.count()

    def counted(self, *arguments, **options):
        for batch in original(self, *arguments, **options):
            if next(count) == k:
                act()
            yield batch

    patch.setattr(data.Data, batches, counted)


class Crash(BaseException):
    """Stands for a process that is killed: nothing is saved."""


def crash() -> None:
    """Ends the run at once."""
    raise Crash


def ask_to_stop() -> None:
    """What a batch system does before the time is up."""
    os.kill(os.getpid(), signal.SIGTERM)


def replay(record: ExitRecord, policy: Policy) -> Outcome:
    """A policy applied to a record, which gives the answers and exits of live inference."""
    return apply_policy(policy, record, record.cost)


def in_torch(network: MultiExitNetwork, example: Tensor) -> RuntimeNetwork:
    """A network in eager torch on the CPU, in the precision of its weights."""
    return RuntimeNetwork(network, EagerRuntime("torch", "f32", torch.device("cpu")), example)


@dataclasses.dataclass(frozen=True)
class Engine(EagerRuntime):
    """Eager torch under the name of a runtime in integers."""

    name: str = "engine-int8"
    precision: str = "int8"
    device: torch.device = CPU_DEVICE

    def context(self):
        """Inference in float32."""
        return torch.inference_mode()


def live_of(batches: Iterable[Answers]) -> Live:
    """What inference with exits taken gave, as it is compared with a record."""
    parts = [
        (
            answers.classes.numpy(),
            answers.exit_index.numpy(),
            answers.score.numpy(),
            answers.logits.amax(dim=-1).numpy(),
        )
        for answers in batches
    ]
    return Live(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def replayed_live(record: ExitRecord, policy: Policy) -> Live:
    """What inference with exits taken gives if nothing is rounded."""
    outcome = replay(record, policy)
    images, exits = np.arange(len(record)), outcome.exit_index
    best = np.stack(
        [
            record.exit_logits(index).numpy().max(axis=-1) / temperature
            for index, temperature in enumerate(policy.temperatures)
        ],
        axis=1,
    )
    scores = outcome.scored.scores[images, exits]
    return Live(outcome.answers, exits, scores, best[images, exits])


def make_folders(root: Path, train: int = 8, val: int = 4) -> Path:
    """Class folders for imagenet/main.py: three classes of JPEGs of 40x30 pixels; the colour tells
    the class and the brightness which image it is."""
    for split, count in (("train", train), ("val", val)):
        for channel, name in enumerate(FOLDERS):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.zeros((30, 40, 3), np.uint8)
                pixels[..., channel] = 100 + 10 * number
                Image.fromarray(pixels).save(root / split / name / f"{number}.JPEG", quality=95)
    return root


def folder_config(root: Path | str, **settings: Any) -> FolderConfig:
    """Settings for what `make_folders` made: images of 16x16 pixels, six of train held out."""
    sizes = {"train_crop": 16, "val_resize": 20, "val_crop": 16, "val_size": 6, "workers": 0}
    return FolderConfig(dataset="set", root=str(root), **{**sizes, **settings})


def load_folders(root: Path | str, **settings: Any) -> folders.Data:
    """Loads what `make_folders` made, with `folder_config`."""
    return folders.load(folder_config(root, **settings), ROOT / "data" / "imagenet")


def fail_to_list(monkeypatch, folder: Path, code: int) -> None:
    """Makes every listing of a folder fail, which file permissions do not do for root."""
    scandir, failing = os.scandir, os.path.realpath(os.fsencode(folder))

    def scan(path):
        if os.path.realpath(os.fsencode(path)) == failing:
            raise OSError(code, os.strerror(code), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)


def forbid(monkeypatch, path: Path) -> None:
    """Makes every look at a path fail, as where it lies in a folder of another user."""
    look = os.stat

    def stat(other, **options):
        if str(other) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), other)
        return look(other, **options)

    monkeypatch.setattr(os, "stat", stat)


def file_names(loaded: folders.Data, split: str) -> list[str]:
    """The path of every image of a split."""
    source, rows = loaded.splits[split]
    return [loaded.images.sources[source].name(row) for row in rows]


def read_all(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All batches, as two tensors."""
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def show_help(script: str, out: int, err: int) -> None:
    """Runs `SCRIPT --help` or `-m MODULE --help` as the interpreter would, writing to those two."""
    os.dup2(out, 1), os.dup2(err, 2)
    sys.argv = [script, "--help"]
    if script.startswith("-m "):
        runpy.run_module(script.removeprefix("-m "), run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str((ROOT / script).parent)
        runpy.run_path(str(ROOT / script), run_name="__main__")


def show_helps(*scripts: str) -> None:
    """Prints a line of JSON for each script: its exit code, its stdout and its stderr. Each runs in
    a process of its own, forked from this one, which has imported what takes long."""
    for name in ("imagenet.main", "early_exit.evaluation.plots"):
        importlib.import_module(name)
    for script in scripts:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = multiprocessing.get_context("fork").Process(
                target=show_help, args=(script, out.fileno(), err.fileno())
            )
            process.start()
            process.join()
            for file in (out, err):
                file.seek(0)
            print(json.dumps([process.exitcode, out.read(), err.read()]))


def main() -> None:
    """The trainer or the evaluation on the tiny network, with a signal sent to itself."""
    if sys.argv[1] == "help":
        show_helps(*sys.argv[2:])
        return
    if os.environ.get("DOUBLE"):
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
    _, name, step, *sys.argv[1:] = sys.argv
    name, _, process = name.partition("@")
    script, prog, batches = trainer, "trainer.py", "train_batches"
    if sys.argv[1] == "eval":
        script, prog, batches = evaluation, sys.argv.pop(1) + ".py", "eval_batches"
    target = os.getppid() if process == "up" else os.getpid()
    if name != "none" and process.replace("up", "0") in ("", os.environ.get("RANK")):
        signum = getattr(signal, name)
        at_batch(pytest.MonkeyPatch(), int(step), lambda: os.kill(target, signum), batches)
    script.TASK = TASK
    distributed.TIMEOUT = timedelta(seconds=float(os.environ.get("PATIENCE", 600)))
    border.run(script.main, prog, log_on_stdout=script is trainer)


if __name__ == "__main__":
    main()
