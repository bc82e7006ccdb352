"""A trained network whose final exit teaches another one."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from early_exit import config as configs
from early_exit.errors import UserError
from early_exit.system.failures import explain_machine
from early_exit.training import checkpoint
from early_exit.training.phases import warn_if_unfinished
from early_exit.training.state import Run

log = logging.getLogger(__name__)


def load_teacher(run: Run, path: Path) -> Callable[[Tensor], Tensor]:
    """What gives the logits (B, K) of the final exit of the run at `path`, for images normalised as
    those of `run`, without a gradient.

    What it has seen, the run has seen: unless val was held out in its training too, val no longer
    counts as unseen. Raises UserError if it has other classes, or takes images of another size or
    normalised otherwise.
    """
    state = checkpoint.load(path)
    if list(map(str, state["classes"])) != list(map(str, run.data.classes)):
        raise UserError(
            f"the teacher {path} has other classes ({len(state['classes'])}) than the data"
            f" ({len(run.data.classes)}); name one that was trained on the same data"
        )
    own = {"mean": list(run.data.mean), "std": list(run.data.std)}
    theirs = state["normalisation"]
    same_channels = all(len(theirs[name]) == len(own[name]) for name in own)
    if not (same_channels and all(np.allclose(theirs[name], own[name]) for name in own)):
        raise UserError(
            f"the teacher {path} takes images normalised by {theirs}, and the"
            f" network by {own}; name one that was trained on the same data"
        )
    if state.get("unseen_val") != run.data.val_hash:
        log.info("the teacher %s may have seen val; evaluate with --val-from test", path)
        run.unseen_val = None
    if run.group.is_main:
        warn_if_unfinished(state, type(run.config), f"the teacher {path}")
    config = configs.build(type(run.config), state["config"])
    network = checkpoint.build_network(state, run.task, config, path)
    backbone = network.backbone.requires_grad_(False).eval()
    backbone.to(run.device).to(memory_format=run.config.run.memory_format)

    @torch.no_grad()
    def teach(images: Tensor) -> Tensor:
        with run.autocast():
            return backbone(images)

    shape = run.network.image_shape  # of val and test
    if side := getattr(run.config.data, "train_crop", None):
        shape = (shape[0], side, side)
    try:
        teach(torch.zeros(2, *shape, device=run.device))
    except (AssertionError, RuntimeError) as error:  # as a vision transformer, for another size
        if explain_machine(error):  # such as no memory
            raise
        raise UserError(
            f"the teacher {path} does not take train images of {shape} ({error}); name one that was"
            " trained on that size"
        ) from None
    return teach
