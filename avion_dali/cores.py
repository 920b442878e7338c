"""How many processor cores there are for us."""

import os


def available_cores() -> int:
    """Return the cores this process may use, which a container or a scheduler may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
