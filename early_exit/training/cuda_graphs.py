"""Forward and backward passes replayed as CUDA graphs.

A small network's kernels end before the next ones are launched, so the launches decide the time of
a step. A graph launches all of them at once. It computes the same.
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
    Turns torch's warning of gradients from another stream off, for the whole process: that of the
    recording is one, and torch waits for it.
    """
    images = torch.zeros(phase.optim.batch_size, *run.network.image_shape, device=run.device)
    images = images.to(memory_format=run.config.run.memory_format)
    module = Replayed(network)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    with run.autocast():
        if torch.is_autocast_enabled(run.device.type):  # graphs cannot share weights in its cache
            torch.set_autocast_cache_enabled(False)
        torch.cuda.make_graphed_callables(module, (images,), allow_unused_input=True)
    for name, buffer in network.named_buffers():  # recording has updated BatchNorm's
        buffer.copy_(buffers[name])
    return as_list(module, phase.backbone_only)


def check_can_replay(run: Run) -> None:
    """Raises UserError if the run asks for CUDA graphs and they cannot be used."""
    config, side = run.config, run.network.image_shape[1]
    if not config.run.cuda_graphs:
        return
    for fails, reason in (
        (run.device.type != "cuda", f"needs a GPU, and the device is {run.device}"),
        (run.group.world > 1, "is for one process, not for torchrun"),
        (config.run.compile, "and --compile exclude each other"),
        (config.optim.accumulate > 1, "and --accumulate exclude each other"),
        (
            getattr(config.data, "train_crop", side) != side,
            "needs --train-crop and --val-crop of one size",
        ),
        # a graph gives the exit gradients of 0, and weight decay would shrink its weights
        (any(map(has_untrained_exit, run.phases)), "needs loss weights above 0"),
    ):
        if fails:
            raise UserError(
                f"--cuda-graphs {reason}; leave it out, or resume with --set run.cuda_graphs=false"
            )


def has_untrained_exit(phase: Phase) -> bool:
    """Whether an exit with parameters to train has a weight of 0."""
    return 0 in (phase.weights[:-1] if phase.backbone_frozen else phase.weights)
