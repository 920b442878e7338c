"""The plan of a read through the packet index: which packets a clip part decodes, and where their bytes lie.

The reader follows this plan, and `avion-dali plan` counts from it. Only the index is read; no chunk is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import BinaryIO

import numpy as np

from avion_dali.contracts import ClipPart, DecodeError, PacketIndexRef, UserError
from avion_dali.data.packet_index import (
    IndexBlock,
    IndexDamagedError,
    PacketIndex,
    PacketPlaces,
    StreamFacts,
)
from avion_dali.decode.packets import PacketRun, drop_unneeded, plan_runs


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Neighboring packets of a chunk file, read with one call.

    Args:
        offset: first byte in the file.
        sizes: bytes of each packet.
    """

    offset: int
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Length of the read."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class RunReads:
    """One run and where its packets lie.

    Args:
        run: the packets, as positions in the block.
        block: the block of the packet index that the run was planned in.
        ranges: the reads, in the order of the run's positions.
    """

    run: PacketRun
    block: IndexBlock
    ranges: tuple[ByteRange, ...]


@dataclass(frozen=True, slots=True)
class PlannedReads:
    """Everything that reading a clip part through the packet index will fetch and decode.

    Args:
        stream: what a decoder must be told.
        runs: in the order of presentation.
        index_reads: bytes of each read of the packet index that this plan itself took.
    """

    stream: StreamFacts
    runs: tuple[RunReads, ...]
    index_reads: tuple[int, ...]

    @property
    def decoded(self) -> int:
        """Coded pictures that are fed to the decoder."""
        return sum(len(planned.run.positions) for planned in self.runs)

    @property
    def read_sizes(self) -> tuple[int, ...]:
        """Bytes of every read, those of the packet index first."""
        return self.index_reads + tuple(r.num_bytes for planned in self.runs for r in planned.ranges)


def planned_reads(part: ClipPart, *, decoder: str) -> PlannedReads:
    """Plan which packets of a chunk a part needs and which byte ranges hold them; the chunk is not opened.

    Args:
        part: the chunk, which has a packet index, and its wanted frames.
        decoder: name that errors carry.

    Raises:
        UserError: when the chunk has no packet index.
        DecodeError: `corrupt` when the index cannot be read or does not hold the frames.
    """
    ref = part.chunk.index
    if ref is None:
        raise UserError(f"{part.chunk.path} has no packet index; make chunks with `avion-dali chunk`")
    try:
        index, index_reads = _open_index(ref)
        runs = tuple(_planned_runs(index, part.frame_ids))
    except (OSError, IndexDamagedError) as error:
        what = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        cause = f"its packet index in {ref.path} {what}; build the manifest again"
        raise DecodeError(
            part.chunk.path, part.frame_ids, decoder=decoder, kind="corrupt", cause=cause
        ) from error
    return PlannedReads(index.stream, runs, tuple(index_reads))


def _open_index(ref: PacketIndexRef) -> tuple[PacketIndex, list[int]]:
    """Open a chunk's record, and return a list that every read of it adds its size to."""
    file, sizes = _index_file(ref.path).fileno(), list[int]()

    def read(start: int, count: int) -> bytes:
        data = os.pread(file, min(count, ref.num_bytes - start), ref.offset + start)
        sizes.append(len(data))
        return data

    return PacketIndex(read), sizes


@lru_cache(maxsize=4)
def _index_file(path: str) -> BinaryIO:
    """Keep index files open: a manifest has one, read for every clip."""
    return open(path, "rb", buffering=0)  # closed when it leaves the cache


def _planned_runs(index: PacketIndex, frame_ids: Sequence[int]) -> Iterator[RunReads]:
    """Plan each block's share of the frames."""
    for number, members in groupby(frame_ids, key=index.block_of):
        block = index.block(number)
        local = [frame_id - block.first_frame for frame_id in members]
        if local[-1] >= len(block.table.order):
            raise IndexDamagedError("knows fewer frames than the manifest")
        for run in drop_unneeded(plan_runs(block.table, local), block.table):
            yield RunReads(run, block, _byte_ranges(block.places, np.array(run.positions)))


def _byte_ranges(places: PacketPlaces, positions: np.ndarray) -> tuple[ByteRange, ...]:
    """Join packets that follow each other in the file."""
    offsets, sizes = places.offset[positions], places.size[positions]
    gaps = np.flatnonzero(offsets[1:] != (offsets + sizes)[:-1]) + 1
    groups = np.split(np.arange(len(positions)), gaps)
    return tuple(ByteRange(int(offsets[group[0]]), tuple(sizes[group].tolist())) for group in groups)
