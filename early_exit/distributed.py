"""Several processes as one: torchrun starts them, each computes its share of every step.

One process alone is a group of one, in which nothing is sent.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from early_exit.errors import UserError


# How long a process waits for one that says nothing, as where a machine or the network between has
# vanished; and for the first one to download what the others will find.
PATIENCE, DOWNLOAD = timedelta(minutes=10), timedelta(hours=2)

LOST = "onnection|imed out|imeout"  # in gloo's messages: its errors have no type of their own


def rank() -> int:
    """This process's number among those that torchrun started; 0 where it did not."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its machine, which is its GPU's."""
    return int(os.environ.get("LOCAL_RANK", 0))


class Lost(RuntimeError):
    """Another process of the group is gone, so nothing can be done together any more."""


@contextmanager
def together() -> Iterator[None]:
    """What all processes do at once; raises Lost where another one is gone meanwhile."""
    try:
        yield
    except RuntimeError as error:
        gone = isinstance(error, dist.DistError) or re.search(LOST, str(error))
        if world_size() > 1 and gone:
            raise Lost("another process of this run is gone; its last line says why") from error
        raise


@dataclass(frozen=True)
class Group:
    """The processes of a run; `control` carries numbers and names, whatever carries gradients, and
    `patient` waits longer."""

    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`, on the CPU."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def most(self, values: Tensor) -> Tensor:
        """The largest of every process's `values`, each for itself, on the CPU."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp) -> Tensor:
        values = values.detach().cpu().clone()
        if self.world > 1:
            with together():
                dist.all_reduce(values, operation, group=self.control)
        return values

    def agree(self, signum: int | None) -> int | None:
        """The signal that any process has seen; all ask at the same place and get one answer."""
        if self.world == 1:
            return signum
        return int(self.most(torch.tensor(signum or 0))) or None

    def leaders(self, value: Any) -> Any:
        """What the first process has for `value`."""
        if self.world == 1:
            return value
        said = [value]
        with together():
            dist.broadcast_object_list(said, src=0, group=self.control)
        return said[0]

    def wait(self, group: dist.ProcessGroup | None = None) -> None:
        """Returns when every process is here; `group` instead of `control` carries the question."""
        if self.world > 1:
            with together():
                dist.barrier(group=group or self.control)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The first process does what is inside before the others begin, so that it downloads or
        writes what they will find."""
        if not self.leads:
            self.wait(self.patient)
        yield
        if self.leads:
            self.wait(self.patient)

    def share_buffers(self, module: nn.Module) -> None:
        """Gives every process the first one's buffers: BatchNorm's statistics differ since the last
        forward."""
        if self.world > 1:
            with together():
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that this process belongs to, for as long as the context lasts."""
    if world_size() == 1:
        yield Group()
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"this process is one of {world_size()} by its environment, and they did not meet"
            f" ({' '.join(str(error).split())[:200]}); start all with torchrun"
        ) from None
    control, patient = (dist.new_group(backend="gloo", timeout=t) for t in (PATIENCE, DOWNLOAD))
    yield Group(dist.get_rank(), dist.get_world_size(), control, patient)
    # Not after an error: taking nccl down is done together, and the others may never come. Torchrun
    # ends them when this process leaves.
    dist.destroy_process_group()
