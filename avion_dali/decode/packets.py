"""The packet plan: selects the coded packets that a set of frames needs.

Packets are stored in decode order. To decode a frame, its GOP is needed from the keyframe to the packet of the
frame; packets of pictures that are neither wanted nor used as references are dropped. The frames are
bit-identical to those from decoding the whole file.

DALI's mini clips consist of the same runs, so this module depends neither on pixels nor on files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avion_dali.data.bitstream import Entry
from avion_dali.data.packet_index import PacketTable


@dataclass(frozen=True, slots=True)
class PacketRun:
    """Packets to feed to a freshly flushed decoder, which is drained afterwards.

    Args:
        positions: decode positions of the packets, ascending; the first packet is a keyframe.
        wanted: decode positions whose frames are kept, ascending.
    """

    positions: tuple[int, ...]
    wanted: tuple[int, ...]


def plan_runs(table: PacketTable, frame_ids: Sequence[int]) -> list[PacketRun]:
    """Select the packets that a set of frames needs.

    The run of a frame starts at the last entry that precedes the frame in decode order and does not follow it
    in presentation order: in an open GOP, frames shown before their keyframe refer to the previous GOP.

    Args:
        table: the packets.
        frame_ids: strictly increasing indices into `table.order`.

    Returns:
        Runs in decode order; together, their `wanted` contain each requested frame once.
    """
    entries = np.flatnonzero(table.entry != Entry.NONE)
    entry_pts = table.pts[entries]
    starts = []
    for position in table.order[np.asarray(frame_ids, dtype=np.int64)].tolist():
        usable = entries[(entries <= position) & (entry_pts <= table.pts[position])]
        starts.append((int(usable[-1]), position))
    groups: list[tuple[int, list[int]]] = []
    for start, position in sorted(starts):
        if groups and start <= max(groups[-1][1]):
            groups[-1][1].append(position)  # the previous run decodes past this entry anyway
        else:
            groups.append((start, [position]))
    return [_run(table, start, wanted=sorted(members)) for start, members in groups]


def _run(table: PacketTable, start: int, *, wanted: Sequence[int]) -> PacketRun:
    positions = np.arange(start, wanted[-1] + 1)
    # Frames shown before the run's keyframe refer to the previous GOP; no later frame refers to them.
    positions = positions[table.pts[positions] >= table.pts[start]]
    return PacketRun(tuple(positions.tolist()), tuple(wanted))


def drop_unneeded(runs: Sequence[PacketRun], table: PacketTable) -> list[PacketRun]:
    """Drop packets whose pictures are neither wanted nor used as references.

    A picture that is not a reference within its temporal layer can be dropped if no picture of a higher layer
    is kept (ITU-T H.265, section 7.4.2.2); codecs without layers have only layer 0.

    Args:
        runs: planned runs.
        table: the packets for which the runs were planned.
    """
    return [_without_unneeded(run, table) for run in runs]


def _without_unneeded(run: PacketRun, table: PacketTable) -> PacketRun:
    kept = np.array(run.positions)
    needed = table.is_reference[kept] | np.isin(kept, run.wanted)
    layers = table.layer[kept]
    for layer in range(int(layers.max()), -1, -1):
        droppable = (layers == layer) & ~needed
        kept, needed, layers = kept[~droppable], needed[~droppable], layers[~droppable]
        if (layers == layer).any():  # a picture kept in this layer may refer to any lower layer
            break
    return PacketRun(tuple(kept.tolist()), run.wanted)


def spanning_run(table: PacketTable, frame_ids: Sequence[int]) -> PacketRun:
    """Return one run from the first wanted frame's keyframe to the last wanted frame; nothing is dropped."""
    runs = plan_runs(table, frame_ids)
    positions = range(runs[0].positions[0], runs[-1].positions[-1] + 1)
    return PacketRun(tuple(positions), tuple(p for run in runs for p in run.wanted))
