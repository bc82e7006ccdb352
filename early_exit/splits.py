"""Cuts of a data set: seeded, stratified, and told apart by a hash; and of a step's images."""

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Share:
    """What one of several processes computes of every step, and in how many goes.

    Part k of a step is computed by process k mod `world`. So two processes compute what one
    computes in two goes, and its gradient is their mean.
    """

    rank: int = 0
    world: int = 1
    goes: int = 1

    @property
    def numbers(self) -> range:
        """The parts of a step that are computed here, in order."""
        return range(self.rank, self.world * self.goes, self.world)

    def parts(self, batch_size: int) -> list[slice]:
        """The rows of a step of `batch_size` images that are computed here, a go each."""
        size = batch_size // (self.world * self.goes)
        return [slice(number * size, (number + 1) * size) for number in self.numbers]

    def batches(self, count: int, batch_size: int) -> list[slice]:
        """The rows of `count` held-out images that are scored here, every image in one process."""
        starts = range(self.rank * batch_size, count, self.world * batch_size)
        return [slice(start, min(start + batch_size, count)) for start in starts]


WHOLE = Share()


def seed_of(*numbers: int) -> int:
    """A seed below 2**63 that differs wherever one of the `numbers` does, if all are below
    2**32; a larger one counts as two."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return int(seed >> np.uint64(1))


def stratified(targets: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Indices (size,), sorted, of a random sample with every class in its share.

    Where the shares are not whole numbers, the classes with the largest rests get one more.
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
