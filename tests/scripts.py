"""Running the scripts: as processes of their own, and on a network and data that take no time.

    python tests/scripts.py SIGTERM 8 FLAGS      cifar10/trainer.py with that network and that data,
                                                 sent a signal before its ninth batch
    python tests/scripts.py none 0 FLAGS         the same, left alone
    python tests/scripts.py SIGTERM@1 8 FLAGS    only the second of torchrun's processes is sent it
    python tests/scripts.py SIGTERM@up 8 FLAGS   the first one sends it to torchrun
    python tests/scripts.py SIGTERM 1 eval RUN   cifar10/eval.py, before its second held-out batch
    python tests/scripts.py help SCRIPT ...      what each script's --help prints, as JSON

With DOUBLE=1 in the environment the network and its training are computed in float64.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifar10 import data, resnet, trainer
from cifar10 import eval as evaluation
from early_exit import cli, distributed
from early_exit.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from early_exit.errors import UserError
from early_exit.experiment import FrontDoor
from early_exit.network import MultiExitNetwork
from early_exit.training import train

ROOT = Path(__file__).resolve().parent.parent
SIDE = 16
FOLDERS = ("ape", "bee", "cat")
CPU = {"run": {"amp": "off", "device": "cpu", "threads": 1}}  # how an evaluation uses the machine
# two epochs of six steps on one CPU thread, in float32
TINY = (
    "--dataset", "digits", "--epochs", "2", "-b", "8", "--lr", "0.05", "--amp", "off",
    "--device", "cpu", "--threads", "1",
)


def tiny_network(config: Config, num_classes: int) -> MultiExitNetwork:
    """A CIFAR ResNet of one block a stage, whatever `model.arch` says."""
    model = config.model
    backbone = resnet.ResNet(1, num_classes)
    places = backbone.default_exits if model.exits is None else model.exits
    return MultiExitNetwork(
        backbone, backbone.units(), places, head=model.head, num_classes=num_classes,
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


DOOR = FrontDoor(tiny_network, tiny_data)


def tiny_run(
    directory: Path,
    door: FrontDoor,
    optim: OptimConfig | None = None,
    split_seed: int = 0,
    regime: str = "joint",
    **model: Any,
) -> Path:
    """A run of `door` in `directory`, on one CPU thread in float32: two epochs of six steps with
    two early exits, unless said otherwise. model: settings of the network."""
    config = Config(
        data=DataConfig(dataset="digits", split_seed=split_seed),
        model=ModelConfig(**{"arch": "resnet20", "exits": ("layer1", "layer2"), **model}),
        optim=optim or OptimConfig(epochs=2, batch_size=8, lr=0.05),
        run=RunConfig(regime=regime, amp="off", device="cpu", threads=1),
    )
    return train(config, door, runs=directory, run_dir=directory)


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
            *inside, sys.executable, *(torchrun if processes else ()), str(ROOT / script),
            *map(str, arguments),
        ],
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=alone,
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


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped, as by SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def told_once(stderr: str, prog: str) -> str:
    """What a script says on the one line that it ends with, without its name; torchrun adds lines
    of its own, and one of its processes may only say it once."""
    said = [line for line in stderr.splitlines() if line.startswith(f"{prog}: ")]
    assert len(said) == 1, stderr
    return said[0].removeprefix(f"{prog}: ")


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
    code = 0
    try:
        cli.run(main, prog)
    except SystemExit as left:
        code = left.code
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
    for name in ("imagenet.main", "early_exit.plots"):
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
    script.DOOR = DOOR
    distributed.PATIENCE = timedelta(seconds=float(os.environ.get("PATIENCE", 600)))
    cli.run(script.main, prog)


if __name__ == "__main__":
    main()
