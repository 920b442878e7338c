"""Arithmetic of `avion-dali plan`: computes clips per second from measurements, without files or timing.

It extends equation 3 of AVION (arXiv 2309.16669, section 4.1), which limits the length of a chunk only by the
read speed of the disk and assumes that every clip reads its whole chunk.
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
        decoded: mean number of decoded pictures per timed clip.
        waiting_ms: time that a worker waits for its reads; 0 if chunks stay in memory.
        disk_ms: time of the disk, which serves all workers at once.
    """

    worker_ms: float
    trainer_ms: float
    decoded: float
    waiting_ms: float = 0.0
    disk_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """Demand of the model for clips and processor time.

    Args:
        clips_per_s: clips per second that all training processes consume; infinite if unknown.
        processes: training processes on this machine.
        core_ms: processor milliseconds per clip that the model uses, to compute or to drive a device.
    """

    clips_per_s: float = math.inf
    processes: int = 1
    core_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Prediction for a machine.

    Args:
        ceilings: clips per second that each part alone would allow: `workers` (fewer than cores, or waiting
            for the disk), `cores`, `disk`, `trainer` (the work of the training processes), `model`.
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
        """The lowest ceiling."""
        return min(self.ceilings.values())

    @property
    def limit(self) -> Limit:
        """The part with the lowest ceiling; `workers` only if more workers would add a tenth or more."""
        lowest = min(self.ceilings, key=lambda name: self.ceilings[name])
        cores_too = self.ceilings["cores"] < 1.1 * self.ceilings["workers"]
        return "cores" if lowest == "workers" and cores_too else lowest

    def workers_for(self, clips_per_s: float) -> int:
        """Return the number of decode processes for a rate; with a slow disk it may exceed the cores.

        The rate is first limited to what the other ceilings allow.
        """
        others = min(rate for name, rate in self.ceilings.items() if name != "workers")
        return max(1, math.ceil(min(clips_per_s, others) * (self.decode_ms + self.waiting_ms) / 1e3))


def forecast(decoded: float, cost: ClipCost, *, cores: int, workers: int, demand: ModelDemand) -> Forecast:
    """Predict the clips per second of a loader.

    A worker waits for its reads and then decodes; workers share the cores with the training process. Clips are
    decoded ahead, so all parts overlap fully and the slowest part determines the rate.

    Args:
        decoded: mean number of decoded pictures per clip; the measured time of a worker is scaled to it.
        cost: cost measured on clips of the same kind.
        cores: processor cores that this process may use; hyper-threads count as cores.
        workers: number of decode processes of all training processes.
        demand: demand of the model.
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
    """A profile and a chunk length, with their forecast.

    Args:
        profile: name of the encoding profile.
        chunk_seconds: length of a chunk in seconds.
        bytes_per_s: bytes per second of video, including the packet index.
        decoded: mean number of decoded pictures per clip.
        reads: mean number of reads per clip, including those of the packet index.
        read_bytes: mean bytes of these reads.
        forecast: the prediction.
    """

    profile: str
    chunk_seconds: float
    bytes_per_s: float
    decoded: float
    reads: float
    read_bytes: float
    forecast: Forecast

    def longest_chunk_s(self, read_mb_s: float) -> float:
        """Return the longest chunk, in seconds, for which each clip can read its whole chunk.

        AVION, arXiv 2309.16669, equation 3: B x bit rate x T_chunk <= read speed x step time.

        Args:
            read_mb_s: read speed in 10^6 bytes per second.
        """
        return read_mb_s * 1e6 / (self.forecast.clips_per_s * self.bytes_per_s)


def recommend(candidates: Sequence[Candidate], *, clips_per_s: float, read_mb_s: float) -> Candidate:
    """Choose a profile, then a chunk length.

    The profile is the one with the smallest files that keep the model busy; if none does, the fastest; without
    a model, the one with the most clips per second and byte. Chunk lengths that cost more than a twentieth of
    speed or bytes are excluded. Of the others, the length nearest to the paper's 15 s that equation 3 allows is
    chosen, for readers of whole chunks; if it allows none, the shortest.

    Args:
        candidates: at least one.
        clips_per_s: clips per second that the model consumes; infinite if unknown.
        read_mb_s: sequential read speed of the disk in 10^6 bytes per second; infinite if unknown.
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
