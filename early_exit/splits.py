"""Cuts of a data set: seeded, stratified, and told apart by a hash."""

import hashlib

import numpy as np


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
