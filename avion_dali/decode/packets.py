"""The packet plan: which coded packets a set of frames needs, and no others.

A file's packets come in decode order. A wanted frame needs its GOP from the keyframe on, up to its own
packet; packets of pictures that nobody refers to and nobody wants are left out. Decoding such a run gives
the same frames, bit for bit, as decoding the whole file.

DALI's mini clips are made of the same runs, so this module knows nothing of pixels or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avion_dali.data.bitstream import Entry
from avion_dali.data.packet_index import PacketTable


@dataclass(frozen=True, slots=True)
class PacketRun:
    """Packets to feed to a freshly flushed decoder, then drain.

    Args:
        positions: decode positions of the packets, ascending, the first a keyframe.
        wanted: decode positions whose frames are kept, ascending.
    """

    positions: tuple[int, ...]
    wanted: tuple[int, ...]


def plan_runs(table: PacketTable, frame_ids: Sequence[int]) -> list[PacketRun]:
    """Choose the packets that a set of frames needs.

    A frame's run starts at the last entry that comes no later than the frame in decode order and in
    presentation order: in an open GOP the frames shown before their keyframe lean on the GOP before.

    Args:
        table: the packets.
        frame_ids: strictly increasing indices into `table.order`.

    Returns:
        Runs in decode order; together their `wanted` are the frames asked for, each once.
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
            groups[-1][1].append(position)  # the run before passes this entry anyway
        else:
            groups.append((start, [position]))
    return [_run(table, start, wanted=sorted(members)) for start, members in groups]


def _run(table: PacketTable, start: int, *, wanted: Sequence[int]) -> PacketRun:
    positions = np.arange(start, wanted[-1] + 1)
    # Frames shown before the run's keyframe lean on the GOP before it; nothing after leans on them.
    positions = positions[table.pts[positions] >= table.pts[start]]
    return PacketRun(tuple(positions.tolist()), tuple(wanted))


def drop_unneeded(runs: Sequence[PacketRun], table: PacketTable) -> list[PacketRun]:
    """Leave out the packets that nobody refers to and nobody wants.

    A picture without references in its temporal layer can go when no picture of a higher layer is kept
    (ITU-T H.265, section 7.4.2.2); codecs without layers have the one layer 0.

    Args:
        runs: planned runs.
        table: the packets they were planned over.
    """
    return [_without_unneeded(run, table) for run in runs]


def _without_unneeded(run: PacketRun, table: PacketTable) -> PacketRun:
    kept = np.array(run.positions)
    needed = table.is_reference[kept] | np.isin(kept, run.wanted)
    layers = table.layer[kept]
    for layer in range(int(layers.max()), -1, -1):
        droppable = (layers == layer) & ~needed
        kept, needed, layers = kept[~droppable], needed[~droppable], layers[~droppable]
        if (layers == layer).any():  # a picture kept in this layer may refer to any below
            break
    return PacketRun(tuple(kept.tolist()), run.wanted)


def spanning_run(table: PacketTable, frame_ids: Sequence[int]) -> PacketRun:
    """Return one run from the first wanted frame's keyframe to the last wanted frame, dropping nothing."""
    runs = plan_runs(table, frame_ids)
    positions = range(runs[0].positions[0], runs[-1].positions[-1] + 1)
    return PacketRun(tuple(positions), tuple(p for run in runs for p in run.wanted))
