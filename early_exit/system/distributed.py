"""Several processes as one run: torchrun starts them, each computes its share of every step.

A single process is a group of one, in which nothing is sent.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from early_exit.errors import Failed, UserError
from early_exit.system.torchrun import world_size

# How long a process waits for a silent one, as when a machine or the network has vanished; and for
# the main process to download what the others will read.
TIMEOUT, DOWNLOAD_TIMEOUT = timedelta(minutes=10), timedelta(hours=2)

LOST = "onnection|imed out|imeout"  # in gloo's messages: its errors have no type of their own


class Lost(Failed):
    """Another process of the group is gone, so nothing can be communicated any more."""

    is_cause = False


@contextmanager
def raise_if_lost() -> Iterator[None]:
    """Wraps communication; raises Lost if another process is gone."""
    try:
        yield
    except Failed:  # its own, whatever words its message has
        raise
    except RuntimeError as error:
        gone = isinstance(error, dist.DistError) or re.search(LOST, str(error))
        if world_size() > 1 and gone:
            raise Lost(
                "another process of this run has ended; see the last line of its log"
            ) from error
        raise


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    `control` communicates numbers and names on the CPU, whatever communicates the gradients;
    `patient` is the same with a longer timeout.
    """

    rank: int = 0
    world: int = 1
    control: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, on the CPU."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The element-wise maximum of `values` over all processes, on the CPU."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        values = values.detach().cpu().clone()
        if self.world > 1:
            with raise_if_lost():
                dist.all_reduce(values, operation, group=self.control)
        return values

    def agree(self, signum: int | None) -> int | None:
        """The signal that any process has received; every process calls this at the same point."""
        if self.world == 1:
            return signum
        return int(self.max(torch.tensor(signum or 0))) or None

    def broadcast(self, value: Any) -> Any:
        """The main process's `value`."""
        if self.world == 1:
            return value
        values = [value]
        with raise_if_lost():
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        """Returns once every process has called it; over `group` instead of `control`."""
        if self.world > 1:
            with raise_if_lost():
                dist.barrier(group=group or self.control)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main process runs the context before the others, so that it downloads or writes what
        they will read."""
        if not self.is_main:
            self.barrier(self.patient)
        yield
        if self.is_main:
            self.barrier(self.patient)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Gives every process the main one's buffers: BatchNorm's statistics differ after a forward
        pass."""
        if self.world > 1:
            with raise_if_lost():
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """The group that this process belongs to, within the context."""
    if world_size() == 1:
        yield Group()
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the environment says that this process is one of {world_size()}, but they could"
            f" not connect ({' '.join(str(error).split())[:200]}); start all of them with"
            " torchrun"
        ) from None
    groups: list[Any] = [
        dist.new_group(backend="gloo", timeout=limit) for limit in (TIMEOUT, DOWNLOAD_TIMEOUT)
    ]
    yield Group(dist.get_rank(), dist.get_world_size(), *groups)
    # Not after an error: shutting nccl down is collective, and the others may never come. Torchrun
    # ends them when this process exits.
    dist.destroy_process_group()
