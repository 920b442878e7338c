"""Plans the reads of a clip part with the packet index: which packets are decoded, and which bytes are read.

The reader executes this plan, and `avion-dali plan` counts it. Only the index is read; chunks are not opened.
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
    """Adjacent packets of a chunk file, fetched with one read.

    Args:
        offset: position of the first byte in the file.
        sizes: size of each packet in bytes.
    """

    offset: int
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the read."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class RunReads:
    """One run and the byte ranges of its packets.

    Args:
        run: the packets, as positions within the block.
        block: the block of the packet index for which the run was planned.
        ranges: the byte ranges, in the order of the run's positions.
    """

    run: PacketRun
    block: IndexBlock
    ranges: tuple[ByteRange, ...]


@dataclass(frozen=True, slots=True)
class PlannedReads:
    """Everything that is read and decoded for a clip part with a packet index.

    Args:
        stream: properties of the stream that a decoder needs.
        runs: the runs in presentation order.
        index_reads: bytes of each read of the packet index that this plan required.
    """

    stream: StreamFacts
    runs: tuple[RunReads, ...]
    index_reads: tuple[int, ...]

    @property
    def decoded(self) -> int:
        """Number of coded pictures that are fed to the decoder."""
        return sum(len(planned.run.positions) for planned in self.runs)

    @property
    def read_sizes(self) -> tuple[int, ...]:
        """Bytes of each read, those of the packet index first."""
        return self.index_reads + tuple(r.num_bytes for planned in self.runs for r in planned.ranges)


def planned_reads(part: ClipPart, *, decoder: str) -> PlannedReads:
    """Plan the packets of a chunk that a part needs and their byte ranges, without opening the chunk.

    Args:
        part: the chunk, which has a packet index, and its wanted frames.
        decoder: name of the decoder in errors.

    Raises:
        UserError: when the chunk has no packet index.
        DecodeError: `corrupt` when the index cannot be read or does not contain the frames.
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
    """Open the record of a chunk, and return it with a list to which the size of each of its reads is added."""
    file, sizes = _index_file(ref.path).fileno(), list[int]()

    def read(start: int, count: int) -> bytes:
        data = os.pread(file, min(count, ref.num_bytes - start), ref.offset + start)
        sizes.append(len(data))
        return data

    return PacketIndex(read), sizes


@lru_cache(maxsize=4)
def _index_file(path: str) -> BinaryIO:
    """Open an index file and keep it open: a manifest has one file, which is read for every clip."""
    return open(path, "rb", buffering=0)  # closed when it is evicted from the cache


def _planned_runs(index: PacketIndex, frame_ids: Sequence[int]) -> Iterator[RunReads]:
    """Plan the runs of each block."""
    for number, members in groupby(frame_ids, key=index.block_of):
        block = index.block(number)
        local = [frame_id - block.first_frame for frame_id in members]
        if local[-1] >= len(block.table.order):
            raise IndexDamagedError("has fewer frames than the manifest")
        for run in drop_unneeded(plan_runs(block.table, local), block.table):
            yield RunReads(run, block, _byte_ranges(block.places, np.array(run.positions)))


def _byte_ranges(places: PacketPlaces, positions: np.ndarray) -> tuple[ByteRange, ...]:
    """Merge packets that are adjacent in the file."""
    offsets, sizes = places.offset[positions], places.size[positions]
    gaps = np.flatnonzero(offsets[1:] != (offsets + sizes)[:-1]) + 1
    groups = np.split(np.arange(len(positions)), gaps)
    return tuple(ByteRange(int(offsets[group[0]]), tuple(sizes[group].tolist())) for group in groups)
