"""Times a server with exits taken beside the plain network in the same server, in one run.

    python benchmarks/serving.py runs/mine            an evaluated run, with accuracy and --adapt
    python benchmarks/serving.py                      ResNet-56 with random weights and images
    python benchmarks/serving.py runs/mine --encoded  PNG files in place of tensors
    python benchmarks/serving.py --runtime openvino   in OpenVINO in place of ONNX Runtime
    python benchmarks/serving.py --arch resnet18 --image-size 224 --images 256 --batch-sizes 1 8

The same engine and the same HTTP server run the plain network; exits without regrouping (a batch
stays together and is answered when its last image is); exits with regrouping; and, of a run, these
with --adapt. First the model's seconds per answer are measured without HTTP while rows always wait,
beside the segments' ideal at full batches. Then requests of one image arrive at random (Poisson) at
rising rates, and do not wait for answers. Latency counts from when a request was due. A request
that is refused has no latency. Everything runs in one runtime (--runtime) in float32, on Linux:
each server is pinned to --cores processors, the client is a process on the others. With random
weights each threshold is the quantile of the scores at which the requested share of random images
exits.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from early_exit.cli.border import run

    run("serving", "serving.py")

import argparse
import dataclasses
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from network_flags import CIFAR_SIZE, NETWORK, add_network_flags, check_shares
from serving_arms import ADAPTIVE, NAMES, PLAIN, REGROUPED, TOGETHER, Arm, Server, servers
from serving_load import (
    answers_per_second,
    arrival_times,
    png_request,
    send_all,
    summary,
    tensor_request,
)
from serving_results import LOADED, Loaded, loaded, loaded_row, saturated_table, to_json
from serving_saturated import measure

from early_exit.cli import flags
from early_exit.errors import UserError
from early_exit.inference.runtimes.packages import import_package
from early_exit.serve import PACKAGES
from early_exit.serving.adapt import HOLD
from early_exit.serving.engine import EngineSettings
from early_exit.system.files import write_text

if TYPE_CHECKING:
    from serving_models import Models

CLIENTS = 64  # of which each waits for its answer; more than fill a server
RUNTIMES = ("onnxruntime", "openvino")
OF_A_RUN = {"eval": None, "task": None, "data": None, "max_drop": 2.0}
"""The flags that have an effect with a RUN alone, and their defaults."""
OF_RANDOM_WEIGHTS = {**NETWORK, "exits": ["layer2.0", "layer3.0"]}
"""Those that have an effect without one alone."""
WARM_UP = 0.2  # of the seconds of a load, before them


def parser() -> flags.Parser:
    """The benchmark's flags."""
    settings = EngineSettings(1)
    parser = flags.build_parser("serving.py", "python benchmarks/serving.py [RUN] [flags]", __doc__)
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        metavar="RUN",
        help="run directory that was evaluated, or one of its evaluations RUN/eval/NAME (default:"
        " a network with random weights)",
    )
    group = parser.add_argument_group("of a run")
    group.add_argument("--eval", metavar="NAME", help="evaluation whose policy is used")
    group.add_argument("--task", metavar="MODULE:NAME", help="task that made the run")
    flags.add_data_flag(group)
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="points of accuracy on val that --adapt may lose (default 2)",
    )
    group = parser.add_argument_group("random weights")
    add_network_flags(group, OF_RANDOM_WEIGHTS)
    parser.set_defaults(**dict.fromkeys(OF_RANDOM_WEIGHTS))  # `fill_in` has to know what was given
    _add_measuring_flags(parser.add_argument_group("what is measured"), settings)
    return parser


def _add_measuring_flags(group: argparse._ArgumentGroup, settings: EngineSettings) -> None:
    for flag, kind, default, metavar, text in (
        ("--cores", int, 1, "N", "processors of a server, one worker each"),
        ("--max-rows", int, 512, "N", "images in progress in a server; then it refuses"),
        ("--target-p99", float, 1000 * settings.target, "MS", "milliseconds, as of the server"),
        ("--patience", float, settings.patience, "SHARE", "of the target, as of the engine"),
        ("--turns", int, 3, "N", "measurements of each batch size without HTTP"),
        ("--saturated-seconds", float, 1.0, "S", "of each of them, at least"),
        ("--seconds", float, 12.0, "S", "of each arm at each rate"),
        ("--seed", int, 0, "N", "of the arrivals and the images"),
    ):
        group.add_argument(
            flag, type=kind, default=default, metavar=metavar, help=f"{text} (default {default:g})"
        )
    group.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default=RUNTIMES[0],
        metavar="NAME",
        help=f"of all networks: {' or '.join(RUNTIMES)} (default {RUNTIMES[0]})",
    )
    group.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=[1, 8, 32, 64],
        metavar="N",
        help="largest batches to time without HTTP (default 1 8 32 64)",
    )
    group.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help="largest batch of the servers (default: as the server picks it for the exits)",
    )
    group.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.3, 0.6, 0.9, 1.2, 1.5],
        metavar="R",
        help="requests/s, as multiples of what the plain network answers at most (default 0.3 0.6"
        " 0.9 1.2 1.5)",
    )
    group.add_argument(
        "--encoded", action="store_true", help="send PNG files to /v1/classify in place of tensors"
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory for serving.json and serving.png (default: neither is written)",
    )


def fill_in(args: argparse.Namespace) -> None:
    """Sets the defaults of the flags of a run, or else of random weights. Raises UserError for
    flags of the other kind, which would be ignored."""
    own, others = OF_RANDOM_WEIGHTS, OF_A_RUN
    if args.run is not None:
        own, others = others, own
    given = {name for name, value in vars(args).items() if value is not None}
    if args.settings:
        given.add("data")
    ignored = [flags.flag_of(name) for name in others if name in given]
    if ignored:
        have = f"have no effect {'without' if args.run is None else 'with'} a RUN"
        raise UserError(f"some flags {have}; remove {' and '.join(ignored)}")
    vars(args).update({name: value for name, value in own.items() if name not in given})


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what cannot be measured."""
    flags.check_at_least(args, 1, "cores", "turns", "images", "max_batch", "batch_sizes")
    flags.check_at_least(args, 0, "max_drop", "patience", "seed")
    flags.check_at_least(args, CIFAR_SIZE, "image_size")
    flags.check_at_least(args, CLIENTS, "max_rows")
    for name in ("seconds", "saturated_seconds", "target_p99", "rates"):
        for value in np.atleast_1d(getattr(args, name)):
            if not value > 0:
                raise UserError(f"{flags.flag_of(name)} must be more than 0, got {value}")
    if args.run is None:
        check_shares(args)
    if args.runtime == "openvino" and args.cores > 1:
        raise UserError(
            "--cores must be 1 in openvino, where a segment runs one batch at a time: the plain"
            f" network would use 1 of the {args.cores} processors"
        )
    available = len(os.sched_getaffinity(0))
    if args.cores > available:
        raise UserError(f"--cores is {args.cores}; this process may use {available}")


def arms_of(args: argparse.Namespace, directory: Path) -> list[Arm]:
    """What is compared. directory: of the deployed models."""
    exits = directory / "exits"
    arms = [
        Arm(PLAIN, directory / "plain", args.runtime),
        Arm(TOGETHER, exits, args.runtime),
        Arm(REGROUPED, exits, args.runtime),
    ]
    if args.run is not None:
        arms.append(Arm(ADAPTIVE, exits, args.runtime, args.max_drop / 100))
    return arms


def load_server(
    server: Server,
    requests: Sequence[bytes],
    target: np.ndarray | None,
    rate: float,
    args: argparse.Namespace,
    arm: str,
) -> Loaded:
    """One arm at one rate; requests: one for each image."""
    warm_up = WARM_UP * args.seconds
    due = arrival_times(rate, warm_up + args.seconds, args.seed)
    chosen = np.random.default_rng(args.seed).integers(0, len(requests), len(due))
    before = server.usage()
    replies = send_all(server.port, [requests[number] for number in chosen], due)
    after = server.usage()
    classes = None if target is None else target[chosen]
    return loaded(arm, rate, summary(replies, warm_up, args.seconds, classes), before, after)


def load_all(
    started: Mapping[str, Server],
    requests: Sequence[bytes],
    target: np.ndarray | None,
    args: argparse.Namespace,
    expected: float,
) -> list[Loaded]:
    """All arms at all rates, at each rate in random order. Prints the rows of the table.

    expected: the answers/s of the plain network without HTTP.
    """
    count = max(100, round(expected * args.seconds / 2))
    many = [requests[number % len(requests)] for number in range(count)]
    print(f"answers/s of {CLIENTS} clients that send the next request at once:")
    full = {}
    for arm, server in started.items():
        full[arm] = answers_per_second(server.port, many, CLIENTS)
        print(f"  {NAMES[arm]:30s} {full[arm]:7.0f}", flush=True)
    print(f"\n{LOADED}", flush=True)
    order, found = random.Random(args.seed), []
    for rate in args.rates:
        for arm in order.sample(list(started), len(started)):
            if arm == ADAPTIVE:
                time.sleep(1.2 * HOLD + 3 * args.target_p99 / 1000)  # until its own policy is back
            one = load_server(started[arm], requests, target, rate * full[PLAIN], args, arm)
            print(loaded_row(one), flush=True)
            found.append(one)
    return sorted(found, key=lambda one: (one.rate, list(NAMES).index(one.arm)))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints two tables."""
    args = parser().parse_args(argv)
    fill_in(args)
    check(args)
    for package in (*PACKAGES, args.runtime, *(["matplotlib"] if args.out else [])):
        import_package(package)
    from serving_models import make_models  # imports torch, which the other processes do without

    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        models = make_models(args, Path(directory))
        compare(args, models, arms_of(args, Path(directory)), cores)


def compare(
    args: argparse.Namespace, models: "Models", arms: Sequence[Arm], cores: Sequence[int]
) -> None:
    """Measures the arms, prints the tables and writes what --out asks for. cores: those that this
    process may use, which are divided between the servers and the client."""
    client_cores = cores[args.cores :] or cores
    settings = EngineSettings(
        max_batch=args.max_batch or 1,
        workers=args.cores,
        max_rows=args.max_rows,
        target=args.target_p99 / 1000,
        patience=args.patience,
    )
    os.sched_setaffinity(0, client_cores)
    print(f"{models.machine}\n\nwithout HTTP, rows always wait:\n", flush=True)
    plain, together, regrouped, *_ = arms
    saturated, picked = measure(
        (plain, together, regrouped),
        models.images,
        args.batch_sizes,
        cores[0],
        args.saturated_seconds,
        args.turns,
        settings,
    )
    print(f"{saturated_table(saturated)}\n", flush=True)
    settings = dataclasses.replace(settings, max_batch=args.max_batch or picked)
    title = (
        f"{models.name}; {args.runtime}, server on {args.cores} of {len(cores)} processors, client"
        f" on {'the same' if client_cores == cores else 'the others'}; batches of at most"
        f" {settings.max_batch}"
    )
    print(f"{title}\n")
    make = png_request if args.encoded else tensor_request
    requests = [make(image) for image in models.images]
    fastest = min(one.seconds for turns in saturated.values() for one in turns[PLAIN])
    with servers(arms, settings, cores[: args.cores]) as started:
        found = load_all(started, requests, models.target, args, args.cores / fastest)
    if not args.out:
        return
    values = {
        "title": title,
        "machine": models.machine,
        "settings": vars(args),
        "saturated": {
            size: {name: list(map(to_json, turns)) for name, turns in one.items()}
            for size, one in saturated.items()
        },
        "loaded": list(map(to_json, found)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(
        args.out / "serving.json",
        json.dumps(values, indent=1, default=str, allow_nan=False) + "\n",
    )
    from serving_figure import draw  # imports torch

    draw(found, settings.target, title, args.out / "serving.png")
