"""The accuracy of every exit of a checkpoint on a split."""

import logging
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from early_exit.config import Config
from early_exit.data.base import Data
from early_exit.data.file_lists import check_same_classes, with_val_of
from early_exit.data.splits import Shard
from early_exit.errors import DataError, UserError
from early_exit.model.losses import joint_loss
from early_exit.system.device import autocast_context, set_up
from early_exit.system.distributed import Group
from early_exit.task import Task
from early_exit.training import checkpoint
from early_exit.training.phases import warn_if_unfinished
from early_exit.training.state_dicts import load_into
from early_exit.training.steps import Tally, score_batches

log = logging.getLogger(__name__)


@torch.no_grad()
def score(
    config: Config,
    task: Task,
    split: str,
    path: Path | None,
    saved: dict | None,
    group: Group,
) -> tuple[tuple[str, ...], Tally]:
    """The names of the exits and the counts on a split, for the weights of a checkpoint (`saved`,
    read at `path`) or of `config.model.backbone`, which has no heads to score."""
    device, precision = set_up(config.run)
    with group.main_process_first():
        data: Data = task.load_data(config.data)
    if saved and path:
        check_same_classes(data, path, saved["classes"])
        if split == "val":
            with suppress(DataError):  # for another val there is a warning below
                data, _ = with_val_of(data, path, saved["val_hash"])
    network = task.build_network(config, len(data.classes))
    if saved:
        owner = " ".join(["--arch", config.model.arch, "--exits", *network.exit_names[:-1]])
        load_into(network, checkpoint.reported(saved), path or Path("the checkpoint"), owner)
        meta = saved
    elif network.num_exits > 1:
        raise UserError(
            "--backbone loads no heads, so only the final exit can be scored; add --exits none"
        )
    else:
        assert config.model.backbone, "the command line asks for one"
        meta = checkpoint.load_backbone_into(network, Path(config.model.backbone))
    if split == "val" and meta.get("unseen_val") != data.val_hash and group.is_main:
        log.warning("these weights may have been trained on val images; --split test is unbiased")
    layout = config.run.memory_format
    data = data.normalised_by(meta.get("normalisation")).to(device, layout)
    network.to(device).to(memory_format=layout).eval()
    if config.run.compile:
        network.compile()
    if group.is_main:
        warn_if_unfinished(meta, type(config), "this run" if saved else config.model.backbone)
    tally = Tally(network.num_exits, device)
    loss_fn = partial(joint_loss, weights=(1.0,) * network.num_exits)
    batches = data.eval_batches(split, data.eval_batch, Shard(group.rank, group.world))
    for _ in score_batches(
        network, batches, loss_fn, partial(autocast_context, precision, device), tally
    ):
        pass
    total = tally.gathered(group)
    if total.images < data.size(split) and group.is_main:
        left_out = data.size(split) - total.images
        log.warning(
            "%d of %d images of %s are left out: their files are unreadable",
            left_out,
            data.size(split),
            split,
        )
    return network.exit_names, total
