"""Seeded, stratified splits, identified by a hash, and the shards of a step."""

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shard:
    """The images of every step that one of several processes computes, in micro-batches.

    Micro-batch k of a step is computed by process k mod `world`. So two processes compute what one
    process computes in two micro-batches, and its gradient is their mean.
    """

    rank: int = 0
    world: int = 1
    micro_batches: int = 1
    """Of this process, per step."""

    @property
    def numbers(self) -> range:
        """The numbers of the micro-batches that are computed here, in order."""
        return range(self.rank, self.world * self.micro_batches, self.world)

    def slices(self, batch_size: int) -> list[slice]:
        """The rows of each of these micro-batches in a step of `batch_size` images."""
        size = batch_size // (self.world * self.micro_batches)
        return [slice(number * size, (number + 1) * size) for number in self.numbers]

    def eval_slices(self, count: int, batch_size: int) -> list[slice]:
        """The rows of `count` held-out images that are scored here, every image in one process."""
        starts = range(self.rank * batch_size, count, self.world * batch_size)
        return [slice(start, min(start + batch_size, count)) for start in starts]


WHOLE = Shard()


def seed_of(*numbers: int) -> int:
    """A seed below 2**63 that differs if one of the `numbers` does, for numbers below 2**32; a
    larger one counts as two."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return int(seed >> np.uint64(1))


def stratified(targets: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Indices (size,), sorted, of a random sample with the class proportions of `targets`.

    Where the proportions are not whole numbers, the classes with the largest remainders get one
    more.
    """
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(targets, return_counts=True)
    quota = counts * size / len(targets)
    take = np.floor(quota).astype(int)
    for index in np.argsort(take - quota, kind="stable")[: size - take.sum()]:
        take[index] += 1
    chosen = [
        rng.permutation(np.flatnonzero(targets == label))[:number]
        for label, number in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def index_hash(name: str, indices: np.ndarray) -> str:
    """A short hash of which images of `name` are held out."""
    content = name.encode() + np.asarray(indices, dtype="<i8").tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def halves(targets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two stratified halves."""
    chosen = stratified(targets, len(targets) // 2, seed)
    return chosen, np.setdiff1d(np.arange(len(targets)), chosen)
