"""The real loader on one machine: clips per second by profile, decoder and workers, and what bounds them.

python -m benchmarks.loader [--memory-clips 1000] [--videos FILE ...] [--folder DIR]

Like figures 2 and 7 of AVION (arXiv 2309.16669). Machines with more workers than this one has cores are
simulated by workers that sleep for as long as they would decode: what the trainer's process does for a clip
(plan it, hand it over, copy it out) is real there. Linux only: processor time and memory come from /proc.

Workers import this module, and their memory is measured: what measures them is imported late.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from avion_dali.contracts import ClipRequest
from avion_dali.cores import available_cores
from avion_dali.data.profiles import PROFILES

MEMORY_FILES = 500
SIMULATED_WORKERS = (16, 64)
WANTED_PROFILES = ("compat", "balanced", "fast", "intra")
REQUIREMENT = {
    "speed_up_1_to_2_workers_at_least": 1.95,
    "first_clip_s_below": 1.0,
    "worker_memory_mb_below": 150.0,
}


def deliver_at_once(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """A decoder that does nothing: what remains is the cost of loading."""


def sleep_instead(request: ClipRequest, frames_VTHWC: np.ndarray, *, seconds: dict[str, float]) -> None:
    """A decoder that takes as long as a real one without using the processor.

    Args:
        request: the clip.
        frames_VTHWC: left as it is.
        seconds: to sleep, by what `sleep_key` makes of the clip.
    """
    profile = Path(request.parts[0].chunk.path).parents[1].name
    time.sleep(seconds[sleep_key(profile, len(request.gather))])


def sleep_key(profile: str, num_frames: int) -> str:
    """What a simulated decoder goes by: the chunk's profile and the clip's frames."""
    return f"{profile}/{num_frames}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-clips", type=int, default=1_000, help="of the memory measurement")
    parser.add_argument("--rounds", type=int, default=2, help="repetitions; the best counts")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement")
    parser.add_argument("--videos", type=Path, nargs="+", help="load from these instead of procedural videos")
    parser.add_argument("--folder", type=Path, help="keep chunks here; by default they are thrown away")
    measure_and_report(parser.parse_args())


def worker_counts(cores: int) -> tuple[int, ...]:
    """One, its doubles, and all cores."""
    return (*(2**k for k in range(cores.bit_length()) if 2**k < cores), cores)


def measure_and_report(options: argparse.Namespace) -> None:
    """Run everything and write the JSON and the picture."""
    from benchmarks import corpus, loader_report, loader_runs
    from benchmarks.machine import machine_facts, print_rows, write_result

    profiles = tuple(name for name in PROFILES if name in WANTED_PROFILES)
    cores = available_cores()
    bench = loader_runs.LoaderBench(
        profiles=profiles,
        workers=worker_counts(cores),
        simulated_workers=tuple(n for n in SIMULATED_WORKERS if n > cores),
        rounds=options.rounds,
        seconds=options.seconds,
        memory_clips=options.memory_clips,
    )
    machine = machine_facts()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        videos = options.videos or corpus.write_sources(folder / "videos", corpus.SourceSettings())
        manifests = loader_runs.prepare(videos, folder, profiles, files=MEMORY_FILES)
        rates = {profile: corpus.mbit_per_s(manifests[profile, corpus.FOUR.name]) for profile in profiles}
        rows = loader_runs.run_all(manifests, bench)
    rows[0] |= {"videos": [path.name for path in videos], "chunk_mbit_per_s": rates}
    print_rows(rows)
    print(loader_report.readme_table(rows))
    picture = loader_report.draw(rows)
    print(write_result("loader", rows, machine=machine, baseline=REQUIREMENT, picture=picture))


if __name__ == "__main__":
    main()
