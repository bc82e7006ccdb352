"""What both sides of benchmarks/peers.py load, and the answers that they must give."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from inference import BATCH, policy_for_logits, set_statistics
from network_flags import check_order
from torch import Tensor

from cifar10 import networks
from early_exit.errors import UserError
from early_exit.inference.policy import Policy

ROUNDING = 1e-5  # of a float32 score after some fifty layers


@dataclass(frozen=True)
class Reference:
    """The logits of all exits, from which the answers of both sides follow.

    logits: (images, exits, classes); scores: (images, exits).
    """

    exit_names: tuple[str, ...]
    logits: np.ndarray
    scores: np.ndarray
    thresholds: tuple[float, ...]

    @property
    def shares(self) -> np.ndarray:
        """The shares of the images that take each exit, (exits,)."""
        count, num_exits = self.scores.shape
        exits = expected_exits(self.margins(count, group=1))
        return np.bincount(exits, minlength=num_exits) / count

    def margins(self, count: int, group: int) -> np.ndarray:
        """How far the scores of the first `count` images are above the thresholds, (count, early
        exits). group: as in `check`."""
        scores = self.scores[:count].reshape(count // group, group, -1).min(axis=1)
        return np.repeat(scores[:, :-1] - self.thresholds, group, axis=0)

    def check(self, name: str, exits: np.ndarray, classes: np.ndarray, group: int) -> int:
        """The number of exits that differ from the reference within rounding of a threshold.

        exits, classes: (images,), of whole batches, the first ones. group: that many images in a
        row exit together, where the least sure one is sure enough. Raises UserError for another
        difference.
        """
        count = len(exits)
        margins = self.margins(count, group)
        expected = expected_exits(margins)
        rows = np.flatnonzero(exits != expected)
        first = np.minimum(exits, expected)[rows]  # where one exited and the other did not
        wrong = (abs(margins[rows, first]) > ROUNDING).sum()
        logits = self.logits[np.arange(count), exits]
        behind = logits.max(axis=1) - logits[np.arange(count), classes]
        wrong_classes = (behind > ROUNDING * abs(logits).max(axis=1)).sum()
        if wrong or wrong_classes:
            raise UserError(
                f"{name} took another exit for {wrong} and gave another class for {wrong_classes}"
                f" of {count} images than the logits of all exits"
            )
        return len(rows)


def expected_exits(margins: np.ndarray) -> np.ndarray:
    """The first exit (images,) that is sure enough, or the final one. margins: (images, early
    exits)."""
    return np.pad(margins >= 0, ((0, 0), (0, 1)), constant_values=True).argmax(axis=1)


def write_job(args: argparse.Namespace, directory: Path) -> Reference:
    """Writes what `peer_sides.load_job` reads."""
    torch.manual_seed(0)
    network = networks.build_network(args.arch, tuple(args.exits), args.head)
    check_order(args, network.exit_names)
    network.to(memory_format=torch.channels_last)
    images = torch.randn(args.images, 3, 32, 32)
    set_statistics(network, images[:BATCH])
    with torch.inference_mode():
        logits = torch.cat([torch.stack(network(batch), 1) for batch in images.split(BATCH)])
    policy = policy_for_logits(network.exit_names, logits, args.exit_shares, "max_prob")
    torch.save(network.state_dict(), directory / "weights.pt")
    torch.save(images, directory / "images.pt")
    job = {
        "arch": args.arch,
        "exits": network.exit_names[:-1],
        "head": args.head,
        "thresholds": policy.thresholds,
        "shares": args.exit_shares,
        "runtimes": args.runtimes,
        "threads": args.threads,
    }
    (directory / "job.json").write_text(json.dumps(job))
    return make_reference(logits, policy)


def make_reference(logits: Tensor, policy: Policy) -> Reference:
    """The reference for logits (images, exits, classes) under a policy."""
    scores = [policy.score(index, logits[:, index])[1] for index in range(policy.num_exits)]
    return Reference(
        policy.exit_names,
        logits.numpy(),
        torch.stack(scores, dim=1).double().numpy(),
        policy.thresholds,
    )
