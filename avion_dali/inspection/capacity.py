"""How many clips per second a machine delivers: arithmetic on measured costs, nothing is opened or timed here.

It extends equation 3 of AVION (arXiv 2309.16669, section 4.1), which bounds the length of a chunk by the disk
alone, assuming that a clip reads its whole chunk. Here a clip reads the coded pictures it needs, which are
counted exactly from the packet index, so its cost is known for any profile, number of frames and span without
having been timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations

import numpy as np

PAPER_CHUNK_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class ClipNeeds:
    """What one clip asks for, or the mean over several.

    Args:
        decoded: coded pictures fed to the decoder.
        rendered: pictures cropped, scaled and converted.
        picture_bytes: size of these coded pictures.
        reads: separate reads, those of the packet index included.
        read_bytes: bytes of these reads.
        chunk_bytes: size of the chunk files the clip touches, what a reader of whole chunks reads.
    """

    decoded: float
    rendered: float
    picture_bytes: float
    reads: float
    read_bytes: float
    chunk_bytes: float


def mean_needs(clips: Sequence[ClipNeeds]) -> ClipNeeds:
    """Return the mean of several clips' needs.

    Args:
        clips: at least one.
    """
    return ClipNeeds(*np.mean([astuple(clip) for clip in clips], axis=0).tolist())


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Processor milliseconds of a clip, linear in what it needs.

    Args:
        base: per clip.
        per_decoded: per coded picture.
        per_rendered: per picture kept.
        per_100kb: per 100 kB of coded pictures; entropy decoding costs by the bit.
    """

    base: float
    per_decoded: float
    per_rendered: float
    per_100kb: float

    def ms(self, needs: ClipNeeds) -> float:
        """Return the milliseconds of a clip.

        Args:
            needs: the clip's, or a mean: the mean of the costs is the cost of the means.
        """
        return float(np.dot(astuple(self), _features(needs)))


def _features(needs: ClipNeeds) -> tuple[float, float, float, float]:
    return 1.0, needs.decoded, needs.rendered, needs.picture_bytes / 1e5


def fit_decode_cost(clips: Sequence[ClipNeeds], ms: Sequence[float]) -> DecodeCost:
    """Find the costs that explain timed clips best: least squares of the relative errors, no cost negative.

    Args:
        clips: what was timed; of several shapes, or the costs cannot be told apart.
        ms: processor milliseconds of each, > 0.
    """
    times = np.array(ms)
    rows = np.array([_features(clip) for clip in clips]) / times[:, None]
    best, least = np.zeros(rows.shape[1]), math.inf
    # Four columns have fifteen subsets; the best one without negative costs solves the bounded problem.
    for size in range(1, rows.shape[1] + 1):
        for columns in map(list, combinations(range(rows.shape[1]), size)):
            found = np.linalg.lstsq(rows[:, columns], np.ones(len(rows)), rcond=None)[0]
            error = float(((rows[:, columns] @ found - 1) ** 2).sum())
            if error < least and (found >= 0).all():
                best, least = np.zeros(rows.shape[1]), error
                best[columns] = found
    return DecodeCost(*best.tolist())


@dataclass(frozen=True, slots=True)
class ReadCost:
    """Time of reads from a disk.

    Args:
        ms_per_read: for each read, whatever its size.
        mb_per_s: 10^6 bytes per second on top.
    """

    ms_per_read: float
    mb_per_s: float

    def ms(self, reads: float, num_bytes: float) -> float:
        """Return the milliseconds of some reads.

        Args:
            reads: how many.
            num_bytes: of all together.
        """
        return reads * self.ms_per_read + num_bytes / (1e3 * self.mb_per_s)


def fit_read_cost(small: tuple[float, float], large: tuple[float, float]) -> ReadCost:
    """Split measured reads of two sizes into a cost per read and a cost per byte.

    Args:
        small: (bytes, milliseconds) of a small read.
        large: (bytes, milliseconds) of a large read.
    """
    if large[0] < 2 * small[0]:  # files too small to tell
        return ReadCost(large[1], math.inf)
    ms_per_byte = (large[1] - small[1]) / (large[0] - small[0])
    per_read = small[1] - ms_per_byte * small[0]
    if ms_per_byte <= 0 or per_read < 0:  # a disk that is no slower for more bytes, or noise
        return ReadCost(0.0, large[0] / large[1] / 1e3)
    return ReadCost(per_read, 1 / ms_per_byte / 1e3)


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """A disk without its page cache.

    Args:
        sequential_mb_s: one reader, in order.
        random_reads_per_s: reads of 64 KiB at random places, all readers together.
        alone: one reader at random places; what a worker waits for.
        together: all readers at random places, time per read over all of them; what the disk can do at most.
        readers: how many that were.
    """

    sequential_mb_s: float
    random_reads_per_s: float
    alone: ReadCost
    together: ReadCost
    readers: int


@dataclass(frozen=True, slots=True)
class TrainerCost:
    """Processor milliseconds of a clip in the training process: planning, handing out, collecting, copying.

    Args:
        base: per clip, of a process that does nothing else.
        per_frame: per frame of the clip.
        waking: per clip on top, where clips come one by one and the process sleeps between them.
    """

    base: float
    per_frame: float
    waking: float = 0.0

    def ms(self, num_frames: int) -> float:
        """Return the milliseconds of a clip at the highest rate.

        Args:
            num_frames: clip length T.
        """
        return self.base + num_frames * self.per_frame


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured of a machine, independent of profiles.

    Args:
        cores: processor cores this process may use; hyper-threads count as cores.
        physical_cores: cores without hyper-threads.
        busy_slowdown: processor time of a clip when all cores decode, relative to one core decoding alone;
            hyper-threads and shared memory make it more than 1.
        trainer: the training process's share.
        disk: where the chunks lie; None where they stay in memory, or nothing could be measured.
    """

    cores: int
    physical_cores: int
    busy_slowdown: float
    trainer: TrainerCost
    disk: DiskSpeed | None = None

    def slowdown(self, busy: float) -> float:
        """Return how much longer a clip takes beside others: linear between none and all cores busy.

        Cores that share nothing but memory slow each other from the second on; hyper-threads come into use
        when the physical cores are taken.

        Args:
            busy: cores that decode.
        """
        first = self.physical_cores if self.physical_cores < self.cores else 1
        if self.cores <= first:
            return 1.0
        share = min(max((busy - first) / (self.cores - first), 0.0), 1.0)
        return 1.0 + share * (self.busy_slowdown - 1.0)


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """What the model asks of the loader and of the processor.

    Args:
        clips_per_s: clips it takes per second, over all training processes; infinite when unknown.
        processes: training processes on this machine.
        core_ms: processor milliseconds of a clip that it takes itself, for computing or for driving a device.
    """

    clips_per_s: float = math.inf
    processes: int = 1
    core_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a machine delivers.

    Args:
        clips_per_s: the lowest of the ceilings.
        binds: name of that ceiling.
        ceilings: clips per second that each part alone would allow: `workers` (too few processes) or, with one
            for each core, `reads` (they wait for the disk; more of them help), `cores`, `disk`, `trainer` (the
            training processes' own work), `model`.
        decode_ms: processor milliseconds of a clip in a worker.
        waiting_ms: milliseconds a worker waits for the disk.
        core_ms: processor milliseconds of a clip in all processes together.
    """

    clips_per_s: float
    binds: str
    ceilings: dict[str, float]
    decode_ms: float
    waiting_ms: float
    core_ms: float

    def cores_for(self, clips_per_s: float) -> float:
        """Return the cores that a rate keeps busy.

        Args:
            clips_per_s: the rate.
        """
        return clips_per_s * self.core_ms / 1e3

    def workers_for(self, clips_per_s: float) -> int:
        """Return the decode processes a rate needs; more than cores where they wait for the disk.

        Args:
            clips_per_s: the rate; of a rate out of reach, the part that other ceilings allow counts.
        """
        others = min(rate for name, rate in self.ceilings.items() if name not in ("workers", "reads"))
        return max(1, math.ceil(min(clips_per_s, others) * (self.decode_ms + self.waiting_ms) / 1e3))


def forecast(
    needs: ClipNeeds,
    cost: DecodeCost,
    machine: Machine,
    *,
    num_frames: int,
    workers: int,
    demand: ModelDemand | None = None,
) -> Forecast:
    """Predict the clips per second of a loader.

    A worker reads, waiting, and then decodes; workers share the cores with the training process. The parts
    overlap fully, since clips are decoded ahead, so the slowest one decides.

    Args:
        needs: mean needs of the clips.
        cost: what they cost to decode.
        machine: what was measured of it.
        num_frames: clip length T.
        workers: decode processes on the machine.
        demand: the model's; without one the loader runs alone.
    """
    demand = demand or ModelDemand()
    decode_ms = cost.ms(needs) * machine.slowdown(min(workers, machine.cores))
    trainer_ms = machine.trainer.ms(num_frames)
    waiting_ms = machine.disk.alone.ms(needs.reads, needs.read_bytes) if machine.disk else 0.0
    core_ms = decode_ms + trainer_ms + machine.trainer.waking + demand.core_ms
    ceilings = {
        "workers" if workers < machine.cores else "reads": workers * 1e3 / (decode_ms + waiting_ms),
        "cores": machine.cores * 1e3 / core_ms,
        "trainer": demand.processes * 1e3 / trainer_ms if trainer_ms else math.inf,
        "model": demand.clips_per_s,
    }
    if machine.disk:
        ceilings["disk"] = 1e3 / machine.disk.together.ms(needs.reads, needs.read_bytes)
    binds = min(ceilings, key=lambda name: ceilings[name])
    return Forecast(ceilings[binds], binds, ceilings, decode_ms, waiting_ms, core_ms)


def longest_chunk_s(*, clips: float, mbit_per_s: float, step_s: float, read_mb_s: float) -> float:
    """Return the longest chunk, in seconds, that may be read whole for each clip.

    AVION, arXiv 2309.16669, equation 3: B x bit rate x T_chunk <= read speed x step time.

    Args:
        clips: B, clips of a step.
        mbit_per_s: bit rate of the chunks in 10^6 bits per second.
        step_s: seconds of a step.
        read_mb_s: read speed in 10^6 bytes per second.
    """
    return read_mb_s * 8 * step_s / (clips * mbit_per_s)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to make the chunks, with what it would deliver.

    Args:
        profile: its name.
        chunk_seconds: length of a chunk.
        bytes_per_hour: of video, packet index included.
        mbit_per_s: bit rate of the chunks.
        needs: of the mean clip.
        forecast: with all workers.
    """

    profile: str
    chunk_seconds: float
    bytes_per_hour: float
    mbit_per_s: float
    needs: ClipNeeds
    forecast: Forecast


def recommend(candidates: Sequence[Candidate], *, clips_per_s: float, read_mb_s: float) -> Candidate:
    """Choose a profile, then a chunk length.

    The profile: the smallest files among those that keep the model busy; where none does, the fastest. Without
    a model, the most clips per second for the bytes. The length, of those that cost less than a twentieth of
    speed or bytes: the nearest to the paper's 15 s that equation 3 allows at the rate reached, so that readers
    of whole chunks can live with the chunks too; else the shortest.

    Args:
        candidates: at least one.
        clips_per_s: what the model takes; infinite when unknown.
        read_mb_s: sequential read speed of the disk; infinite when unknown.
    """
    enough = [c for c in candidates if c.forecast.clips_per_s >= clips_per_s]
    if math.isinf(clips_per_s):
        best = max(candidates, key=lambda c: c.forecast.clips_per_s / c.bytes_per_hour)
    elif enough:
        best = min(enough, key=lambda c: c.bytes_per_hour)
    else:
        best = max(candidates, key=lambda c: c.forecast.clips_per_s)
    lengths = [c for c in candidates if c.profile == best.profile and _as_good(c, best)]
    allowed = [c for c in lengths if c.chunk_seconds <= _bound_s(c, read_mb_s)]
    if not allowed:
        return min(lengths, key=lambda c: c.chunk_seconds)
    return min(allowed, key=lambda c: abs(math.log(c.chunk_seconds / PAPER_CHUNK_SECONDS)))


def _bound_s(candidate: Candidate, read_mb_s: float) -> float:
    rate = candidate.forecast.clips_per_s
    return longest_chunk_s(clips=rate, mbit_per_s=candidate.mbit_per_s, step_s=1.0, read_mb_s=read_mb_s)


def _as_good(candidate: Candidate, best: Candidate) -> bool:
    fast = candidate.forecast.clips_per_s >= 0.95 * best.forecast.clips_per_s
    return fast and candidate.bytes_per_hour <= 1.05 * best.bytes_per_hour
