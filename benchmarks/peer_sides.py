"""What benchmarks/peers.py times, each side in a process of its own: earlyon, and this library.

earlyon's process runs the interpreter that has earlyon. Both sides load the same job, a directory:
`job.json` names the network, its thresholds and the number of threads; `weights.pt` is its state
dict; `images.pt` are the images.
"""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cifar10.networks import build_network
from early_exit.errors import UserError
from early_exit.system.device import keep_freed_memory

if TYPE_CHECKING:
    from early_exit.model.network import MultiExitNetwork

UNTIMED_BATCHES = 4  # at the start of a turn, in which the other modes' threads fall asleep


@dataclass(frozen=True)
class Mode:
    """One way to answer images."""

    images: Tensor
    """In the memory format that suits it."""
    call: Callable[[Tensor], Any]
    """Takes a batch; what is timed."""
    read: Callable[[Any], tuple[list[int], list[int]]]
    """The exits and the classes in what `call` returned, one each per image; an exit of -1 is the
    final one."""
    batch_sizes: str = "any"
    """`one`, `several` or `any`: the numbers of images it takes."""
    as_a_whole: bool = False
    """Whether all images of a batch take the same exit."""


@dataclass(frozen=True)
class Side:
    """A library with the network loaded."""

    versions: str
    modes: Mapping[str, Mode]

    def answers(self, name: str, batch_size: int) -> tuple[list[int], list[int]]:
        """The exits and the classes of all images in whole batches."""
        mode = self.modes[name]
        batches = whole_batches(mode.images, batch_size)
        exits, classes = zip(*(mode.read(mode.call(batch)) for batch in batches))
        return list(itertools.chain(*exits)), list(itertools.chain(*classes))

    def seconds(self, name: str, batch_size: int) -> float:
        """The seconds per batch, on average over all whole batches."""
        call = self.modes[name].call
        batches = whole_batches(self.modes[name].images, batch_size)
        for batch in itertools.islice(itertools.cycle(batches), UNTIMED_BATCHES):
            call(batch)
        began = time.perf_counter()
        for batch in batches:
            call(batch)
        return (time.perf_counter() - began) / len(batches)


def whole_batches(images: Tensor, size: int) -> list[Tensor]:
    """The images in batches of `size`, without the last partial one."""
    return [batch for batch in images.split(size) if len(batch) == size]


def serve(make_side: Callable[[Path], Side], directory: str, descriptor: int) -> None:
    """Makes a side and answers the calls that arrive on a pipe, until its other end is closed.

    descriptor: of the pipe. Sends the versions and per mode its batch sizes and whether it answers
    a batch as a whole, then for each `(method, arguments)` what the method returns. Sends a text
    instead where the user can correct the error, or a package is missing.
    """
    with Connection(descriptor) as pipe:
        try:
            side = make_side(Path(directory))
            modes = {name: (mode.batch_sizes, mode.as_a_whole) for name, mode in side.modes.items()}
            pipe.send((side.versions, modes))
            while True:
                method, arguments = pipe.recv()
                pipe.send((getattr(side, method)(*arguments),))
        except EOFError:
            return
        except UserError as error:
            pipe.send(str(error))
        except ImportError as error:
            pipe.send(f"{error}; install earlyon==0.3.0 and what this library needs there")


def load_job(directory: Path) -> tuple[dict[str, Any], MultiExitNetwork, Tensor]:
    """The job, its network in eval mode and its images; sets the number of threads and how memory
    is kept, for either side alike."""
    job = json.loads((directory / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    keep_freed_memory()
    network = build_network(job["arch"], tuple(job["exits"]), job["head"])
    network.load_state_dict(torch.load(directory / "weights.pt", weights_only=True))
    network.to(memory_format=torch.channels_last).eval()
    images = torch.load(directory / "images.pt", weights_only=True)
    return job, network, images.to(memory_format=torch.channels_last)


def earlyon_side(directory: Path) -> Side:
    """earlyon's: hooks on the whole backbone for one image (`hooks`) and for a batch (`batched`),
    and the backbone cut into stages (`staged`), which takes one image."""
    import earlyon
    from earlyon.staged import staged_model

    job, network, images = load_job(directory)
    units = list(network.units)
    hooked = wrap(network, network.backbone, list(network.cuts), job["thresholds"])
    _, network, _ = load_job(directory)  # modules with no hooks of the other mode
    sequence = nn.Sequential(
        OrderedDict((name.replace(".", "_"), unit) for name, unit in network.units.items())
    )
    layers = [units[cut].replace(".", "_") for cut in network.cuts.values()]
    staged = staged_model(wrap(network, sequence, layers, job["thresholds"]))
    return Side(
        f"earlyon {earlyon.__version__} with torch {torch.__version__}"
        f" and Python {platform.python_version()}",
        {
            "hooks": Mode(images, hooked, read_one, "one"),
            "staged": Mode(images, staged.infer, read_one, "one"),
            "batched": Mode(images, hooked.forward_inference_batched, read_batch, "several", True),
        },
    )


def wrap(
    network: MultiExitNetwork, backbone: nn.Module, layers: list[str], thresholds: list[float]
) -> Any:
    """earlyon's wrapper of a backbone, with the network's own heads after the named layers."""
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    heads = dict(network.heads.items())
    config = EarlyExitConfig(
        backbone="custom",
        num_classes=network.num_classes,
        # the number of channels is for heads that earlyon builds
        exit_points=[ExitPoint(name, layer, 0) for name, layer in zip(heads, layers, strict=True)],
        confidence_thresholds=thresholds,
    )
    shape = (1, *network.image_shape)
    return EarlyExitWrapper(backbone, heads, nn.Identity(), config, input_shape=shape).eval()


def read_one(result: Any) -> tuple[list[int], list[int]]:
    """Of earlyon's result for one image."""
    return [result.exit_taken], result.prediction.argmax(-1).tolist()


def read_batch(result: Any) -> tuple[list[int], list[int]]:
    """Of earlyon's result for a batch."""
    classes = result.predictions.argmax(-1).tolist()
    return [result.exit_taken] * len(classes), classes


def our_side(directory: Path) -> Side:
    """This library's: one mode per runtime. A runtime of less precision gets thresholds of its own,
    at which as many images exit as with float32."""
    from inference import policy_for_logits

    from early_exit.inference.policy import Policy
    from early_exit.inference.runtimes.network import RuntimeNetwork
    from early_exit.inference.runtimes.packages import import_package
    from early_exit.inference.runtimes.table import find_runtime

    job, network, images = load_job(directory)
    policy = Policy(exit_names=network.exit_names, thresholds=job["thresholds"])

    def read(answers: Any) -> tuple[list[int], list[int]]:
        return answers.exit_index.tolist(), answers.classes.tolist()

    def mode_of(name: str) -> Mode:
        runtime = find_runtime(name, threads=job["threads"])
        run = RuntimeNetwork(network, runtime, images[:2])
        own = policy
        if runtime.precision != "f32":
            logits = torch.stack(run(images), dim=1)
            own = policy_for_logits(network.exit_names, logits, job["shares"], policy.criterion)
        suited = images if name == "torch" else images.contiguous()
        return Mode(suited, lambda batch: run.infer(batch, own), read)

    modes = {name: mode_of(name) for name in job["runtimes"]}
    versions = [f"torch {torch.__version__}"]
    for package in ("onnxruntime", "openvino"):
        if any(name.startswith(package) for name in modes):
            versions.append(f"{package} {import_package(package).__version__}")
    return Side(", ".join(versions), modes)
