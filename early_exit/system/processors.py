"""The number of processors that this process may use."""

import math
import os
from pathlib import Path

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds per period


def processors() -> int:
    """The number of processors that this process may use. The CPU limit of a container counts,
    which Python does not look at."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not available on this system
        available = os.cpu_count() or 1
    try:
        quota, period = map(float, CPU_LIMIT.read_text().split())
    except (OSError, ValueError):  # no control groups, or no limit ("max")
        return available
    return max(1, min(available, math.ceil(quota / period)))
