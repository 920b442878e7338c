"""Facts about the machine for benchmark results, and readings of processor time and memory.

Imports stay light: spawned processes whose memory is measured import the benchmark's module again.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("avion_dali", "torch", "numpy", "av", "pillow", "pyarrow", "pebble", "nvidia-dali-cuda130"),
    *("open_clip_torch", "torchcodec", "decord", "spdl"),
)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_facts() -> dict[str, Any]:
    """Processor, cores this process may use, memory, GPUs, and the load average before the benchmark began."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpu_names(),
        "load_average_1_5_15_min": [round(load, 2) for load in os.getloadavg()],
    }


def git_commit() -> str:
    """The checked-out commit, with `+changes` when tracked files differ from it; empty outside a checkout."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if commit and changes else "")


def process_memory_mb(pid: int | str = "self") -> dict[str, float]:
    """Memory of a process in MB (10^6 bytes): VmRSS, RssAnon (private), RssFile (mapped files). Linux only."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    wanted = ("VmRSS", "RssAnon", "RssFile")
    return {name: round(int(fields[name].split()[0]) * 1024 / 1e6, 1) for name in wanted}


def process_cpu_s(pid: int) -> float:
    """Processor seconds a process has used, all threads together; other load changes it little."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def machine_cpu_s() -> float:
    """Processor seconds all cores together were busy since the machine started. Linux only."""
    user, nice, system, _idle, _iowait, irq, softirq = Path("/proc/stat").read_text().split()[1:8]
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu_names() -> list[str]:
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()


def _output(*command: str) -> str:
    """Output of a program; empty when it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def in_fresh_process(function: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Run a measurement in a spawned process, as another rank would start."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
