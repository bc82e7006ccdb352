"""Running the scripts: as processes of their own, and on a network and data that take no time.

    python tests/scripts.py FLAGS        cifar10/trainer.py with that network and that data
"""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cifar10 import data, resnet, trainer
from early_exit import cli
from early_exit.config import DataConfig, ModelConfig
from early_exit.experiment import FrontDoor
from early_exit.network import MultiExitNetwork

ROOT = Path(__file__).resolve().parent.parent
# two epochs of six steps on one CPU thread, in float32
TINY = (
    "--dataset", "digits", "--epochs", "2", "-b", "16", "--lr", "0.05", "--amp", "off",
    "--device", "cpu", "--threads", "1",
)


def tiny_network(model: ModelConfig, num_classes: int) -> MultiExitNetwork:
    """A CIFAR ResNet of one block a stage, whatever `model.arch` says."""
    backbone = resnet.ResNet(1, num_classes)
    places = resnet.DEFAULT_EXITS if model.exits is None else model.exits
    return MultiExitNetwork(
        backbone, backbone.units(), places, head=model.head, num_classes=num_classes,
        example=torch.zeros(1, 3, 32, 32),
    )


@functools.cache
def few_digits(split_seed: int) -> data.Data:
    """The digits with 96 train, 60 val and 100 test images."""
    whole = data.load("digits", split_seed=split_seed)
    sizes = {"train": 96, "val": 60, "test": 100}
    splits = {name: whole.splits[name].subset(np.arange(size)) for name, size in sizes.items()}
    return dataclasses.replace(whole, splits=splits)


def tiny_data(settings: DataConfig) -> data.Data:
    """What `few_digits` gives, whatever `settings.dataset` says."""
    return few_digits(settings.split_seed)


DOOR = FrontDoor(tiny_network, tiny_data)


def start(script: str, *arguments: object, cwd: Path) -> subprocess.Popen:
    """A script of the repository as a process of its own, on one thread."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Waits for a started script and gives what it wrote."""
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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


if __name__ == "__main__":
    trainer.DOOR = DOOR
    cli.run(trainer.main, "trainer.py")
