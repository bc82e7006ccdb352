"""The seconds of an evaluation, read back from its report."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Seconds:
    """Seconds per image at one batch size, all measured in turns in one process."""

    plain: float
    """The plain network."""
    live: float
    """The chosen policy, with exits taken."""
    networks: dict[str, float]
    """Networks without exits, by name."""
    curve: np.ndarray | None
    """(P,): of the curve's points on test, expected from the times of the segments, by the points'
    rising MACs; None if the segments were not timed."""


def read_seconds(report: dict[str, Any], order: np.ndarray) -> dict[int, Seconds]:
    """The seconds of a report by batch size.

    order: (P,), which point of the report's curve comes where.
    """
    shares = {
        int(row["batch_size"]): np.array(row["test"], dtype=float)[order]
        for row in report.get("curve_seconds") or ()
    }
    found = {}
    for timing in report.get("timing", ()):
        size, images = int(timing["batch_size"]), int(timing["images"])
        plain = timing["plain"]["total"] / images
        found[size] = Seconds(
            plain=plain,
            live=timing["live"]["total"] / images,
            networks={
                name: took["total"] / images
                for name, took in (timing.get("networks") or {}).items()
            },
            curve=plain * shares[size] if size in shares else None,
        )
    return found
