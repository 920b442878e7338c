"""Which processes of a session are alive: what a test's script must not leave behind."""

import time
from pathlib import Path


def living_members(*sessions: int) -> list[int]:
    """Process ids of the living members of these sessions, by Linux's /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) in sessions and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def left_after(seconds: float, *sessions: int) -> list[int]:
    """Living members of these sessions, once there are none or the time is up."""
    deadline = time.monotonic() + seconds
    while (members := living_members(*sessions)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return members
