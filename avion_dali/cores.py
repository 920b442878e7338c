"""Counts the processor cores that this process may use."""

import os


def available_cores() -> int:
    """Return the number of cores this process may use, respecting limits set by a container or a scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
