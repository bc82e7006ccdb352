"""Forward and backward passes replayed as CUDA graphs.

A small network's kernels end before the next ones are launched, so the launches decide the time of
a step. A graph launches all of them at once. The values are the same.
"""

import torch
from torch import Tensor, nn

from early_exit.errors import UserError
from early_exit.training.phases import Phase
from early_exit.training.state import Run
from early_exit.training.steps import Forward, as_list


class Replayed(nn.Module):
    """A module with the parameters of `network`, whose own `forward` stays as it is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        return self.network(images)


def replayed(run: Run, phase: Phase, network: nn.Module) -> Forward:
    """The forward pass of whole batches, as a list of logits, as two CUDA graphs: this one and its
    backward pass. The gradients of a step are overwritten by the next one.

    The graphs are recorded in the mode and with the parameters to train that the network has now.
    """
    images = torch.zeros(phase.optim.batch_size, *run.network.image_shape, device=run.device)
    images = images.to(memory_format=run.config.run.memory_format)
    module = Replayed(network)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with run.autocast():
        if torch.is_autocast_enabled(run.device.type):  # graphs cannot share weights in its cache
            torch.set_autocast_cache_enabled(False)
        # gradients are recorded on another stream than the steps', which torch then waits for
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        torch.cuda.make_graphed_callables(module, (images,), allow_unused_input=True)
    for name, buffer in network.named_buffers():  # recording has updated BatchNorm's
        buffer.copy_(buffers[name])
    return as_list(module, phase.backbone_only)


def check_can_replay(run: Run) -> None:
    """Raises UserError if the run asks for CUDA graphs and they cannot be used."""
    config = run.config
    if not config.run.cuda_graphs:
        return
    if run.device.type != "cuda":
        raise UserError(
            f"--cuda-graphs needs a GPU, the device is {run.device}; leave it out, or resume with"
            " --set run.cuda_graphs=false"
        )
    if run.group.world > 1:
        raise UserError("--cuda-graphs is for one process; leave it out under torchrun")
    if config.run.compile:
        raise UserError("--cuda-graphs and --compile exclude each other; choose one")
    if config.optim.accumulate > 1:
        raise UserError("--cuda-graphs and --accumulate exclude each other; choose one")
