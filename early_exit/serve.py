"""Serve a deployed model over HTTP, exits taken, batched across requests.

    python -m early_exit.serve models/mine                    http://127.0.0.1:8000
    curl --data-binary @photo.jpg -H "Content-Type: image/jpeg" http://127.0.0.1:8000/v1/classify
    curl -F image=@one.jpg -F image=@two.png http://127.0.0.1:8000/v1/classify

Clients of the Open Inference Protocol (KServe v2, Triton) find the model under /v2. Prometheus
reads /metrics. SIGHUP reads the model's policy.yaml again; SIGTERM answers what is in progress and
ends. Needs the packages of the extra serve (setup.cfg).
"""

if __name__ == "__main__":  # before the imports, which may fail
    from early_exit.cli.border import run

    run("early_exit.serve", "early_exit.serve", needs_torch=False)

import argparse
import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from early_exit import deployed
from early_exit.cli import flags
from early_exit.data.decoding import MAX_PIXELS
from early_exit.deployed import DeployedClassifier
from early_exit.errors import UserError
from early_exit.inference.runtimes.packages import import_package
from early_exit.manifest import is_deployed
from early_exit.serving.batch_size import pick_max_batch
from early_exit.serving.engine import Engine, EngineSettings
from early_exit.serving.limits import Limits
from early_exit.serving.policies import Policies
from early_exit.system import streams
from early_exit.system.processors import processors

PROG = "early_exit.serve"
PACKAGES = ("uvicorn", "starlette", "prometheus_client", "python_multipart")


def parser() -> flags.Parser:
    """The flags."""
    parser = flags.build_parser(PROG, "python -m early_exit.serve MODEL [flags]", __doc__)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="directory of a deployed model, as early_exit.export --format onnx writes it",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0: a free one (default: 8000)"
    )
    parser.add_argument(
        "--name", help="of the model in addresses (default: the name of its directory)"
    )
    parser.add_argument(
        "--runtime",
        metavar="NAME",
        help="onnxruntime, openvino or openvino-bf16; of a model in 8-bit integers only its own"
        " (default: the one that it was made for)",
    )
    _add_engine_flags(parser.add_argument_group("batches"))
    group = parser.add_argument_group("under load")
    group.add_argument(
        "--adapt",
        action="store_true",
        help="exit earlier while images arrive too fast for --target-p99, by the thresholds of the"
        " model's val_curve (default: the thresholds of policy.yaml always)",
    )
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="points of accuracy on val that --adapt may lose, at most",
    )
    _add_limit_flags(parser.add_argument_group("limits"))
    return parser


def _add_engine_flags(group: Any) -> None:
    settings = EngineSettings(max_batch=1)
    for flag, kind, metavar, default, text in (
        ("--workers", int, "N", settings.workers, "threads that run segments (default: 1)"),
        (
            "--threads",
            int,
            "N",
            None,
            "threads of each run of a segment (default: the processors, divided by --workers)",
        ),
        (
            "--max-batch",
            int,
            "N",
            None,
            "images in a run of a segment, at most (default: by measured throughput)",
        ),
        (
            "--max-wait",
            float,
            "MS",
            1000 * settings.max_wait,
            "milliseconds that a smaller batch waits for more images (default: 0)",
        ),
        (
            "--target-p99",
            float,
            "MS",
            1000 * settings.target,
            "milliseconds after which an image should be answered; of batches that are not full,"
            f" those with the earliest such time run first (default: {1000 * settings.target:g})",
        ),
    ):
        group.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)


def _add_limit_flags(group: Any) -> None:
    limits = Limits()
    for flag, kind, metavar, default, text in (
        ("--max-rows", int, "N", EngineSettings(1).max_rows, "images in progress; then 503"),
        ("--max-body", int, "BYTES", limits.max_body, "size of a request's body"),
        ("--max-images", int, "N", limits.max_images, "images in a request"),
        ("--max-pixels", int, "N", limits.max_pixels, "pixels of an image, before it is decoded"),
        ("--stall", float, "SECONDS", 60.0, "run of a segment; then /v2/health/live answers 503"),
        ("--grace", int, "SECONDS", 25, "from SIGTERM to the end of the process"),
    ):
        text = f"{text} (default: {default:g})" if kind is float else f"{text} (default: {default})"
        group.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the model until a signal."""
    args = parser().parse_args(argv)
    _check(args)
    name = _name_of(args)
    for package in PACKAGES:
        import_package(package)
    from early_exit.serving import app, server

    listener = server.bind(args.host, args.port)
    threads = args.threads or max(1, processors() // args.workers)
    model = deployed.load(args.model, runtime=args.runtime, threads=threads)
    settings = EngineSettings(
        max_batch=args.max_batch or _measured_batch(model),
        workers=args.workers,
        max_wait=args.max_wait / 1000,
        max_rows=args.max_rows,
        target=args.target_p99 / 1000,
    )
    engine = Engine(model.segments, model.policy, settings)
    service = app.Service(
        model,
        engine,
        name,
        limits=Limits(
            max_body=args.max_body, max_images=args.max_images, max_pixels=args.max_pixels
        ),
        max_rows=args.max_rows,
        stall=args.stall,
    )
    streams.make_optional()  # a server continues if nobody reads its log
    announce = (
        f"{server.address_of(listener)} serves {name} in {model.runtime}, {args.workers} worker"
        f"{'s' * (args.workers > 1)} of {threads} thread{'s' * (threads > 1)}, at most"
        f" {settings.max_batch} images in a batch"
    )
    max_drop = args.max_drop / 100 if args.adapt else None

    async def serve() -> None:
        policies = Policies(engine, model.manifest, args.model, max_drop, settings.target)
        await server.serve(service, policies, listener, args.grace, announce)

    asyncio.run(serve())


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for numbers that make no sense."""
    flags.check_at_least(args, 0, "port", "max_wait")
    flags.check_at_least(args, 1, "workers", "threads", "max_batch", "target_p99", "stall")
    flags.check_at_least(args, 1, "max_rows", "max_body", "max_images", "max_pixels")
    flags.check_at_least(args, 2, "grace")
    if args.max_wait >= args.target_p99:
        raise UserError(
            f"--max-wait {args.max_wait:g} holds images until --target-p99 {args.target_p99:g} has"
            " passed; both are milliseconds"
        )
    if args.adapt != (args.max_drop is not None):
        raise UserError("--adapt and --max-drop need each other; pass both or none")
    if args.port > 65535:
        raise UserError(f"--port must be at most 65535, got {args.port}")
    if args.max_pixels > MAX_PIXELS:
        raise UserError(f"--max-pixels must be at most {MAX_PIXELS}, got {args.max_pixels}")
    if args.max_images > args.max_rows:
        raise UserError(
            f"--max-images {args.max_images} is more than --max-rows {args.max_rows}: such a"
            " request would always be refused"
        )
    if not is_deployed(args.model):
        raise UserError(
            f"{args.model} is not a deployed model; make one: python -m early_exit.export RUN"
            " DIRECTORY --format onnx"
        )


def _name_of(args: argparse.Namespace) -> str:
    """The model's name. Raises UserError for one that is not a part of an address."""
    name = args.model.resolve().name if args.name is None else args.name
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UserError(
            f"the model's name is {name!r}; pass a --name of A-Z, a-z, 0-9, dots, - and _"
        )
    return name


def _measured_batch(model: DeployedClassifier) -> int:
    """The batch size for grey images."""
    image_input = model.manifest.input
    images = np.full((1, *image_input.shape), 128, np.uint8)
    return pick_max_batch(model.segments, image_input.array(images), model.policy)
