"""Arithmetic of `avion-dali plan`: from what was measured to clips per second. Nothing is opened or timed here.

It extends equation 3 of AVION (arXiv 2309.16669, section 4.1), which bounds the length of a chunk by the disk
alone and assumes that every clip reads its whole chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PAPER_CHUNK_SECONDS = 15.0
Limit = Literal["workers", "cores", "disk", "trainer", "model"]


@dataclass(frozen=True, slots=True)
class ClipCost:
    """Measured milliseconds per clip.

    Args:
        worker_ms: processor time in the worker that decodes the clip, while the other workers decode too.
        trainer_ms: processor time in the training process: planning, scheduling, collecting, copying.
        decoded: mean number of coded pictures of the clips that were timed.
        waiting_ms: time that a worker waits for its reads; 0 where chunks stay in memory.
        disk_ms: time of the disk, which serves all workers at once.
    """

    worker_ms: float
    trainer_ms: float
    decoded: float
    waiting_ms: float = 0.0
    disk_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """What the model asks of the loader and of the processor.

    Args:
        clips_per_s: clips that it takes per second, over all training processes; infinite when unknown.
        processes: training processes on this machine.
        core_ms: processor milliseconds per clip that it takes itself, to compute or to drive a device.
    """

    clips_per_s: float = math.inf
    processes: int = 1
    core_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a machine delivers.

    Args:
        ceilings: clips per second that each part alone would allow: `workers` (fewer than there are cores, or
            waiting for the disk), `cores`, `disk`, `trainer` (the training processes' own work), `model`.
        decode_ms: processor milliseconds per clip in a worker.
        waiting_ms: milliseconds per clip that a worker waits for the disk.
        core_ms: processor milliseconds per clip in all processes together.
    """

    ceilings: dict[Limit, float]
    decode_ms: float
    waiting_ms: float
    core_ms: float

    @property
    def clips_per_s(self) -> float:
        """The lowest of the ceilings."""
        return min(self.ceilings.values())

    @property
    def limit(self) -> Limit:
        """The part that decides; `workers` only where more of them would bring a tenth or more."""
        lowest = min(self.ceilings, key=lambda name: self.ceilings[name])
        cores_too = self.ceilings["cores"] < 1.1 * self.ceilings["workers"]
        return "cores" if lowest == "workers" and cores_too else lowest

    def workers_for(self, clips_per_s: float) -> int:
        """Return the number of decode processes that a rate needs; it may exceed the cores on a slow disk.

        Of a rate out of reach, the part that the other ceilings allow counts.
        """
        others = min(rate for name, rate in self.ceilings.items() if name != "workers")
        return max(1, math.ceil(min(clips_per_s, others) * (self.decode_ms + self.waiting_ms) / 1e3))


def forecast(decoded: float, cost: ClipCost, *, cores: int, workers: int, demand: ModelDemand) -> Forecast:
    """Predict the clips per second of a loader.

    A worker reads, waiting, and then decodes; workers share the cores with the training process. The parts
    overlap fully, since clips are decoded ahead, so the slowest one decides.

    Args:
        decoded: coded pictures that the mean clip decodes; the measured time of a worker is scaled to it.
        cost: measured on clips of the same kind.
        cores: processor cores that this process may use; hyper-threads count as cores.
        workers: decode processes, of all training processes together.
        demand: the model's demand.
    """
    decode_ms = cost.worker_ms * decoded / cost.decoded
    core_ms = decode_ms + cost.trainer_ms + demand.core_ms
    ceilings: dict[Limit, float] = {
        "workers": workers * 1e3 / (decode_ms + cost.waiting_ms),
        "cores": cores * 1e3 / core_ms,
        "disk": 1e3 / cost.disk_ms if cost.disk_ms else math.inf,
        "trainer": demand.processes * 1e3 / cost.trainer_ms if cost.trainer_ms else math.inf,
        "model": demand.clips_per_s,
    }
    return Forecast(ceilings, decode_ms, cost.waiting_ms, core_ms)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to make the chunks, and what it would deliver.

    Args:
        profile: name of the encoding profile.
        chunk_seconds: length of a chunk.
        bytes_per_s: bytes per second of video, packet index included.
        decoded: coded pictures that the mean clip decodes.
        reads: separate reads of the mean clip, those of the packet index included.
        read_bytes: bytes of these reads.
        forecast: what it delivers.
    """

    profile: str
    chunk_seconds: float
    bytes_per_s: float
    decoded: float
    reads: float
    read_bytes: float
    forecast: Forecast

    def longest_chunk_s(self, read_mb_s: float) -> float:
        """Return the longest chunk, in seconds, that may be read whole for every clip.

        AVION, arXiv 2309.16669, equation 3: B x bit rate x T_chunk <= read speed x step time.

        Args:
            read_mb_s: read speed in 10^6 bytes per second.
        """
        return read_mb_s * 1e6 / (self.forecast.clips_per_s * self.bytes_per_s)


def recommend(candidates: Sequence[Candidate], *, clips_per_s: float, read_mb_s: float) -> Candidate:
    """Choose a profile, then a chunk length.

    The profile: the smallest files that keep the model busy; where none do, the fastest; without a model, the
    most clips per second for the bytes. The length, of those that cost less than a twentieth of speed or bytes:
    the nearest to the paper's 15 s that equation 3 allows, for readers of whole chunks; else the shortest.

    Args:
        candidates: at least one.
        clips_per_s: rate that the model takes; infinite when unknown.
        read_mb_s: sequential read speed of the disk in 10^6 bytes per second; infinite when unknown.
    """
    enough = [c for c in candidates if c.forecast.clips_per_s >= clips_per_s]
    if math.isinf(clips_per_s):
        best = max(candidates, key=lambda c: c.forecast.clips_per_s / c.bytes_per_s)
    elif enough:
        best = min(enough, key=lambda c: c.bytes_per_s)
    else:
        best = max(candidates, key=lambda c: c.forecast.clips_per_s)
    rate, size = 0.95 * best.forecast.clips_per_s, 1.05 * best.bytes_per_s
    same = [c for c in candidates if c.profile == best.profile]
    lengths = [c for c in same if c.forecast.clips_per_s >= rate and c.bytes_per_s <= size]
    allowed = [c for c in lengths if c.chunk_seconds <= c.longest_chunk_s(read_mb_s)]
    if not allowed:
        return min(lengths, key=lambda c: c.chunk_seconds)
    return min(allowed, key=lambda c: abs(math.log(c.chunk_seconds / PAPER_CHUNK_SECONDS)))
