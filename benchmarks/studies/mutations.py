"""Damaged copies of video files, determined by a seed, and the outcome of reading clips from them.

Tests use a few of them, and `benchmarks.studies.faults` all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, CropWindow, DecodeError, PacketIndexRef
from avion_dali.decode import cpu_fused
from avion_dali.decode.reading import read_everything, read_planned, read_spanned
from avion_dali.loading.faults import failure_of
from avion_dali.loading.pool import WorkerPool
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.worker import decode_into
from benchmarks.corpus import indexed_chunk

FRAMES_PER_CLIP, FRAME_SIZE = 4, 32
# ISO/IEC 14496-12: boxes that hold boxes, and the bytes before the first of them.
_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts", b"mvex", b"moof", b"traf")
_BOXES_INSIDE = dict.fromkeys(_PARENTS, 0) | {b"stsd": 8, b"avc1": 78, b"hev1": 78, b"hvc1": 78, b"av01": 78}
# RFC 9559: Segment, Info, Tracks, TrackEntry, Video, Cluster, BlockGroup, Cues, CuePoint, CueTrackPositions.
_ELEMENTS_INSIDE = frozenset(
    number.to_bytes((number.bit_length() + 7) // 8, "big")
    for number in (0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675, 0xA0, 0x1C53BB6B, 0xBB, 0xB7)
)
_TELLING_NUMBERS = (0, 1, 2, 0x7FFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Mutate = Callable[[bytearray, np.random.Generator], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of mp4 or an element of Matroska: header from `start` to `content`, numbers up to `end`."""

    start: int
    content: int
    end: int


def pieces(data: bytes) -> list[Piece]:
    """All boxes, elements or packets of a file, outer ones before those inside them."""
    if data[:1] == b"\x47":  # MPEG-TS; a packet begins with 4 bytes of header, and often with times
        return [Piece(at, at + 4, at + 20) for at in range(0, len(data) - 187, 188)]
    walk = _elements if data[:4] == b"\x1a\x45\xdf\xa3" else _boxes
    return list(walk(data, 0, len(data)))


def _boxes(data: bytes, at: int, end: int) -> Iterator[Piece]:
    while at + 8 <= end:
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if not 8 <= size <= end - at:
            return
        yield Piece(at, at + 8, at + 8 if kind == b"mdat" else at + size)
        if kind in _BOXES_INSIDE:
            yield from _boxes(data, at + 8 + _BOXES_INSIDE[kind], at + size)
        at += size


def _elements(data: bytes, at: int, end: int) -> Iterator[Piece]:
    while at + 2 <= end and data[at]:
        size_at = at + 9 - data[at].bit_length()  # leading zero bits count the bytes that follow
        size_bytes = 9 - data[size_at].bit_length()
        content = size_at + size_bytes
        size = int.from_bytes(data[size_at:content], "big") & ((1 << 7 * size_bytes) - 1)
        last = end if size == (1 << 7 * size_bytes) - 1 else min(end, content + size)  # all ones: unknown
        is_block = data[at:size_at] in (b"\xa3", b"\xa1")  # track, time, flags, and then the picture
        yield Piece(at, content, content + 4 if is_block else last)
        if data[at:size_at] in _ELEMENTS_INSIDE:
            yield from _elements(data, content, last)
        at = last


def _flip_bits(data: bytearray, rng: np.random.Generator) -> None:
    for at in rng.integers(0, len(data), int(rng.integers(1, 9))).tolist():
        data[at] ^= 1 << int(rng.integers(0, 8))


def _overwrite(data: bytearray, rng: np.random.Generator) -> None:
    at, size = _stretch(data, rng, longest=400)
    data[at : at + size] = rng.bytes(size)


def _zero(data: bytearray, rng: np.random.Generator) -> None:
    at, size = _stretch(data, rng, longest=len(data) // 4)
    data[at : at + size] = bytes(size)


def _exchange(data: bytearray, rng: np.random.Generator) -> None:
    """Two blocks of a disk in each other's place."""
    size = int(rng.integers(1, min(512, len(data) // 3)))
    a, b = sorted(int(x) for x in rng.integers(0, len(data) - size, 2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def _edit_box(data: bytearray, rng: np.random.Generator) -> None:
    """Change one number of one box: its header, or what it says; never what lies in a picture."""
    found = pieces(bytes(data))
    piece = found[int(rng.integers(len(found)))]
    in_header = piece.content == piece.end or rng.random() < 0.3
    start = piece.start if in_header else piece.content
    stop = piece.content if in_header else min(piece.end, piece.content + 64)
    width = min(int(rng.choice([1, 2, 4])), stop - start)
    at = int(rng.integers(start, stop - width + 1))
    old = int.from_bytes(data[at : at + width], "big")
    new = (*_TELLING_NUMBERS, old + 1, old - 1, int(rng.integers(0, 1 << 32)))[int(rng.integers(11))]
    data[at : at + width] = (new & ((1 << 8 * width) - 1)).to_bytes(width, "big")


def _cut(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(0, len(data))) :]


def _lose(data: bytearray, rng: np.random.Generator) -> None:
    at, size = _stretch(data, rng, longest=400)
    del data[at : at + size]


def _stretch(data: bytearray, rng: np.random.Generator, *, longest: int) -> tuple[int, int]:
    size = int(rng.integers(1, max(2, min(longest, len(data)))))
    return int(rng.integers(0, len(data) - size + 1)), size


SAME_SIZE: dict[str, Mutate] = {
    "flipped bits": _flip_bits,
    "random bytes": _overwrite,
    "zeros": _zero,
    "exchanged blocks": _exchange,
    "box edits": _edit_box,
}
OTHER_SIZE: dict[str, Mutate] = {"truncated": _cut, "lost bytes": _lose}
KINDS = SAME_SIZE | OTHER_SIZE
INDEX_KINDS = tuple(kind for kind in KINDS if kind != "box edits")


def mutated(data: bytes, kind: str, seed: int) -> bytes:
    """A damaged copy, different from `data`; the same for a seed."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    while True:
        copy = bytearray(data)
        KINDS[kind](copy, rng)
        if copy != data:
            return bytes(copy)


@dataclass(frozen=True, slots=True)
class Source:
    """An undamaged video and its expected frames."""

    name: str
    ref: ChunkRef

    def request(self, frame_ids: Iterable[int], ref: ChunkRef | None = None) -> ClipRequest:
        """The clip of these frames, from this video or a damaged copy."""
        ref = ref or self.ref
        ids = tuple(sorted(frame_ids))
        window = CropWindow(8, 4, ref.width - 16, ref.height - 8)
        gather = tuple(range(len(ids)))
        return ClipRequest(0, 0, (ClipPart(ref, ids),), gather, (window,), (False,), FRAME_SIZE)

    def random_ids(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Distinct random frames for one clip."""
        return tuple(sorted(rng.choice(self.ref.num_frames, FRAMES_PER_CLIP, replace=False).tolist()))


def open_source(name: str, path: Path) -> Source:
    """Probe and index a video; its index lies beside it, if its packets can be indexed."""
    ref = indexed_chunk(path)
    return Source(name, ref if ref.index and ref.index.num_bytes else replace(ref, index=None))


def decoded(request: ClipRequest) -> np.ndarray:
    """The clip, decoded in this process."""
    frames = np.zeros(request.frames_shape, np.uint8)
    cpu_fused.decode_clip(request, frames)
    return frames


@dataclass(frozen=True, slots=True)
class Trial:
    """A clip to be read by the pool, and what it must look like if it is delivered."""

    # What outcomes are counted by, such as (codec, kind of damage, with or without index).
    labels: tuple[str, ...]
    request: ClipRequest  # the clip
    expected: np.ndarray  # from the undamaged file


def trials(source: Source, folder: Path, kind: str, seed: int) -> Iterator[Trial]:
    """One damaged copy read with and without the index, and a clip of the sound file after each.

    The manifest is made to agree with the copy's size, so that the size does not reveal the damage.
    """
    data = mutated(Path(source.ref.path).read_bytes(), kind, seed)
    path = folder / f"{source.name}-{kind}-{seed}{Path(source.ref.path).suffix}".replace(" ", "-")
    path.write_bytes(data)
    ids = source.random_ids(np.random.default_rng(seed))
    expected = decoded(source.request(ids))
    damaged = replace(source.ref, path=str(path), size_bytes=len(data))
    for label, ref in (("index", damaged), ("no index", replace(damaged, index=None))):
        if label == "index" and ref.index is None:
            continue
        sound = replace(source.ref, index=ref.index)
        yield Trial((source.name, kind, label), source.request(ids, ref), expected)
        yield Trial((source.name, "sound", label), source.request(ids, sound), expected)


def index_trials(source: Source, folder: Path, kind: str, seed: int) -> Iterator[Trial]:
    """The sound file read through a damaged copy of its packet index."""
    assert source.ref.index is not None
    data = mutated(Path(source.ref.index.path).read_bytes(), kind, seed)
    path = folder / f"{source.name}-{kind}-{seed}.packets".replace(" ", "-")
    path.write_bytes(data)
    ids = source.random_ids(np.random.default_rng(seed))
    ref = replace(source.ref, index=PacketIndexRef(str(path), 0, source.ref.index.num_bytes))
    yield Trial((source.name, kind, "damaged index"), source.request(ids, ref), decoded(source.request(ids)))


def indexed_as(path: Path) -> str:
    """What becomes of a damaged file: `refused`, a reader's `error`, or readers that `agree` or `disagree`."""
    try:
        ref = open_source("", path).ref
        ids = tuple(sorted({i * (ref.num_frames - 1) // 7 for i in range(8)}))
    except DecodeError:
        return "refused"
    try:
        readers = (read_everything, read_planned, read_spanned)
        first, *others = ([f.to_ndarray(format="rgb24") for f in read(ClipPart(ref, ids))] for read in readers)
    except DecodeError:
        return "error"
    same = all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return "agree" if same else "disagree"


def outcomes(
    given: Iterable[Trial], *, workers: int, clip_timeout_s: float, places: int = 16
) -> Iterator[tuple[Trial, str, str]]:
    """Read all clips as a loader would; yields each with its outcome and, when it failed, the cause.

    The outcome is `right`, `wrong`, or the kind of failure.

    Args:
        workers: decode processes.
        clip_timeout_s: see `WorkerPool`.
        places: clips under way at a time.
    """
    waiting = iter(given)
    shape = (1, FRAMES_PER_CLIP, FRAME_SIZE, FRAME_SIZE, 3)
    with (
        WorkerPool(workers=workers, timeout_s=clip_timeout_s) as pool,
        closing(SharedRing(1, (places, *shape))) as ring,
    ):
        while batch := list(islice(waiting, places)):
            ring.frames(0)[:] = 0
            done = [schedule(pool, ring, trial.request, i) for i, trial in enumerate(batch)]
            for i, trial in enumerate(batch):
                yield (trial, *_outcome(done[i], trial, ring.frames(0)[i]))


def schedule(pool: WorkerPool, ring: SharedRing, request: ClipRequest, place: int) -> Future[float]:
    """Have a clip decoded into a row of the ring's first slot."""
    return pool.schedule(decode_into, cpu_fused.decode_clip, request, ring.place(0, place))


def _outcome(done: Future[float], trial: Trial, frames: np.ndarray) -> tuple[str, str]:
    try:
        done.result()
    except Exception as error:  # the process boundary; `failure_of` raises what is not a clip's failure
        failure, part = failure_of(error, trial.request), trial.request.parts[0]
        assert (failure.path, failure.frame_ids) == (part.chunk.path, part.frame_ids)
        return failure.kind, failure.cause
    return ("right", "") if np.array_equal(frames, trial.expected) else ("wrong", "")
