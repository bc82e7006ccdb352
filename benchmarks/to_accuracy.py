"""Time to a test accuracy of 92.6 % on CIFAR-10: the fast recipe against the usual loop.

`benchmarks/training.py --to-accuracy` measures seconds per step, of all loops in turns on the same
random images, and multiplies them by the steps of each recipe; nothing is trained to the end. The
usual loop: ResNet-32 for 200 epochs of 50,000 images in batches of 128. Ours: the network, the
exits and every setting of cifar10/configs/fast.yaml, on the 45,000 images that are left for train;
its steps with the first block trained and with it frozen are timed apart.

Taken from elsewhere: that 200 epochs of ResNet-32 reach 92.63 % (the author of that recipe, of the
best epoch on test), and that fast.yaml reaches 92.6 % at its final exit (its own first lines, and
"Short recipes" in docs-src/docs/train.md). Our validation after each epoch and our start-up are
timed and printed apart; the usual loop's are not counted.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from turns import time_in_turns
from usual import BATCH, random_images, usual_loop

from cifar10 import networks, trainer
from cifar10.data import MEAN, STD
from early_exit import config as configs
from early_exit.config import Config
from early_exit.data.in_memory import Data, cut
from early_exit.errors import UserError
from early_exit.system.device import PRECISIONS, choose_device, choose_precision, set_up
from early_exit.system.distributed import Group
from early_exit.system.signals import StopSignals
from early_exit.training.averages import make_average
from early_exit.training.epochs import epoch_steps
from early_exit.training.optimizer import make_optimizer
from early_exit.training.state import PhaseState, Position, Run
from early_exit.training.steps import Tally, as_list, set_training_mode
from early_exit.training.train import init_from_train, to_device
from early_exit.training.validation import val_batches

PRESET = Path(trainer.__file__).parent / "configs" / "fast.yaml"
ARCH = "resnet32"  # of the usual loop
EPOCHS = 200  # of the usual loop, as its author trains
IMAGES, VAL = 50_000, 5_000  # CIFAR-10's train images, and those that ours holds out


def random_data() -> Data:
    """Random images in place of CIFAR-10's train images, cut into train and val as they are."""
    images, classes = random_images(IMAGES), tuple(map(str, range(10)))
    unused = images  # test
    return cut("random", images, unused, classes, val_size=VAL, mean=MEAN, std=STD, flip=True)


def load_recipe(args: argparse.Namespace) -> Config:
    """The configuration of the fast recipe, in the precision that the flags ask for."""
    values = configs.merge(configs.load_preset(PRESET), trainer.CIFAR10)
    given = {"run": {"device": args.device, "amp": args.amp}}
    return configs.build(Config, configs.merge(values, given))


def start_fast(args: argparse.Namespace) -> Run:
    """What the trainer has when the first step of the fast recipe begins."""
    config = load_recipe(args)
    device, precision = set_up(config.run)
    data = random_data().augmented(config.data.flip, config.data.pad, config.data.pad_mode)
    run = Run(
        config=config,
        task=trainer.TASK,
        data=data,
        network=trainer.build_network(config, len(data.classes)),
        directory=Path(tempfile.gettempdir()),  # nothing is written
        device=device,
        precision=precision,
        group=Group(),
        unseen_val=None,
    )
    to_device(run, None)
    init_from_train(run)
    return run


def fast_steps(args: argparse.Namespace, stem_frozen: bool) -> Iterator[None]:
    """One training step of the fast recipe per `next`, with the first block trained or frozen."""
    run = start_fast(args)
    (phase,) = run.phases
    set_training_mode(run.network, phase.backbone_frozen)
    state = PhaseState(
        position=Position(epoch=phase.optim.stem_epochs if stem_frozen else 0),
        optimizer=make_optimizer(run.network, phase.optim),
        scaler=torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16"),
        tally=Tally(run.network.num_exits, run.device),
        average=make_average(run.network, phase.optim),
    )
    set_training_mode(run.network, phase.backbone_frozen, stem_frozen)
    while True:  # the same epoch again
        for step_done in epoch_steps(
            run, phase, state, as_list(run.network, False), nullcontext, StopSignals(), None
        ):
            if step_done:
                if state.average:
                    state.average.update(run.network)
                yield


def fast_validation(args: argparse.Namespace) -> Iterator[None]:
    """One batch of val through all exits per `next`."""
    run = start_fast(args)
    run.network.eval()
    tally = Tally(run.network.num_exits, run.device)
    while True:
        yield from val_batches(run, run.phases[0], run.network, tally, StopSignals())


def start_up_seconds(args: argparse.Namespace) -> float:
    """Seconds of a new process that does `start_fast` and ends."""
    process = multiprocessing.get_context("spawn").Process(target=start_fast, args=(args,))
    began = time.perf_counter()
    process.start()
    process.join()
    if process.exitcode:
        raise UserError("the start-up failed; its error is printed above")
    return time.perf_counter() - began


def training_seconds(
    config: Config, per_step: Mapping[str, float], images: int, val_batches: int
) -> tuple[float, float]:
    """Seconds of the fast recipe's training steps, and of its validations.

    per_step: seconds of a step `trained` and `frozen`, by whether the first block is trained, and
    of a batch of `val`. images: of train; val_batches: of a validation.
    """
    optim = config.optim
    trained = min(optim.stem_epochs, optim.epochs) if optim.stem_epochs else optim.epochs
    steps = images // optim.batch_size
    training = steps * (
        trained * per_step["trained"] + (optim.epochs - trained) * per_step["frozen"]
    )
    return training, optim.epochs * val_batches * per_step["val"]


def compare(args: argparse.Namespace) -> None:
    """Measures the loops and prints the time of each recipe and their ratio."""
    config = load_recipe(args)
    loops = {
        "usual": partial(usual_loop, arch=ARCH, images=IMAGES),
        "trained": partial(fast_steps, stem_frozen=False),
        "frozen": partial(fast_steps, stem_frozen=True),
        "val": fast_validation,
    }
    seconds = time_in_turns(loops, args, args.steps)
    start_up = statistics.median(start_up_seconds(args) for _ in range(args.turns))
    usual = [EPOCHS * IMAGES / BATCH * value / args.steps for value in seconds["usual"]]
    batches = math.ceil(VAL / Data.eval_batch)
    ours = [
        training_seconds(
            config,
            {name: seconds[name][turn] / args.steps for name in ("trained", "frozen", "val")},
            IMAGES - VAL,
            batches,
        )
        for turn in range(args.turns)
    ]
    print_comparison(args, config, usual, ours, start_up)


def print_comparison(
    args: argparse.Namespace,
    config: Config,
    usual: list[float],
    ours: list[tuple[float, float]],
    start_up: float,
) -> None:
    """Prints what `compare` found: seconds of the usual loop, and of our training and validation,
    in each turn."""
    training, validation = ([pair[part] for pair in ours] for part in (0, 1))
    whole = [sum(pair) + start_up for pair in ours]
    precision = PRECISIONS[choose_precision(args.amp, choose_device(args.device))]
    accuracy = 100 * networks.PUBLIC_ACCURACY[ARCH]
    print(
        "time to 92.6 % on CIFAR-10's test images; extrapolated from"
        f" {args.turns} turns of {args.steps} timed steps of each loop, medians:"
    )
    print(
        f"  usual loop, {ARCH}, float32, {EPOCHS} epochs of {IMAGES:,} images:"
        f" {minutes(usual)} ({accuracy:.2f} %, not measured here: {networks.PUBLIC_SOURCE})"
    )
    print(
        f"  ours, {PRESET.name}, {config.model.arch} with exits, {precision},"
        f" {config.optim.epochs} epochs of {IMAGES - VAL:,} images: {minutes(training)}"
        " (accuracy not measured here: see the preset)"
    )
    print(f"    validation after every epoch: {minutes(validation)}; start-up: {start_up:.1f} s")
    print(f"  ratio of the training steps: {ratio(usual, training)}")
    print(f"  ratio with our validation and start-up: {ratio(usual, whole)}")


def minutes(seconds: list[float]) -> str:
    """The median in minutes."""
    return f"{statistics.median(seconds) / 60:,.1f} min"


def ratio(usual: list[float], ours: list[float]) -> str:
    """The ratio of the medians, and its least and greatest value in a turn."""
    turns = [a / b for a, b in zip(usual, ours, strict=True)]
    medians = statistics.median(usual) / statistics.median(ours)
    return f"{medians:.1f} (turns {min(turns):.1f} to {max(turns):.1f})"
