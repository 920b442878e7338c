"""The packet plan as arithmetic: which packets, and that no needed one is left out."""

import numpy as np

from avion_dali.data.bitstream import Entry
from avion_dali.data.packet_index import PacketTable
from avion_dali.decode.packets import drop_unneeded, plan_runs, spanning_run


def table(pts: list[int], keys: list[int]) -> PacketTable:
    times, positions = np.array(pts), np.arange(len(pts))
    entry = np.where(np.isin(positions, keys), Entry.CLEAN, Entry.NONE).astype(np.uint8)
    return PacketTable(
        times, entry, np.ones(len(pts), dtype=bool), np.zeros(len(pts), np.uint8), np.argsort(times)
    )


def test_a_run_begins_at_the_keyframe_and_ends_at_the_last_wanted_packet() -> None:
    # Decode order I P B B | I P B B, shown 0 3 1 2 | 4 7 5 6.
    plan = plan_runs(table([0, 3, 1, 2, 4, 7, 5, 6], [0, 4]), [1, 6])
    assert [(run.positions, run.wanted) for run in plan] == [((0, 1, 2), (2,)), ((4, 5, 6, 7), (7,))]


def test_untouched_gops_are_skipped() -> None:
    plan = plan_runs(table(list(range(12)), [0, 3, 6, 9]), [1, 10])
    assert [run.positions for run in plan] == [(0, 1), (9, 10)]


def test_unwanted_droppable_packets_are_left_out_and_wanted_ones_kept() -> None:
    packets = table([0, 3, 1, 2, 4, 7, 5, 6], [0])
    packets.is_reference[[2, 3, 6, 7]] = False
    (run,) = drop_unneeded(plan_runs(packets, [2, 5]), packets)
    assert run.positions == (0, 1, 3, 4, 5, 6)
    assert run.wanted == (3, 6)


def test_leading_frames_of_an_open_gop_start_at_the_gop_before() -> None:
    # The second keyframe (shown 6) is decoded before frames 4 and 5, which lean on the first GOP.
    opened = table([0, 3, 1, 2, 6, 4, 5, 9, 7, 8], [0, 4])
    assert [r.positions for r in plan_runs(opened, [4])] == [(0, 1, 2, 3, 4, 5)]
    assert [r.positions for r in plan_runs(opened, [6, 7])] == [(4, 7, 8)]
    # One run serves both when the first passes the second's keyframe anyway.
    assert [r.positions for r in plan_runs(opened, [5, 7])] == [(0, 1, 2, 3, 4, 5, 6, 7, 8)]


def test_spanning_run_drops_nothing() -> None:
    run = spanning_run(table(list(range(12)), [0, 3, 6, 9]), [1, 10])
    assert run.positions == tuple(range(11))
    assert run.wanted == (1, 10)


def test_layers_go_from_the_highest_down_and_only_while_nothing_leans_on_them() -> None:
    """HEVC: a picture nobody in its layer refers to may still serve the layers above."""
    # Decode order: I0, P8, then layer 1 (4), layer 2 (2, 6), layer 3 (1, 3, 5, 7).
    packets = table([0, 8, 4, 2, 6, 1, 3, 5, 7], [0])
    packets.layer[:] = [0, 0, 1, 2, 2, 3, 3, 3, 3]
    packets.is_reference[2:] = False
    assert [r.positions for r in drop_unneeded(plan_runs(packets, [8]), packets)] == [(0, 1)]
    assert [r.positions for r in drop_unneeded(plan_runs(packets, [4]), packets)] == [(0, 1, 2)]
    # Frame 2 is kept in layer 2, so layer 1 stays; so would layer 2 below a frame of layer 3.
    assert [r.positions for r in drop_unneeded(plan_runs(packets, [2]), packets)] == [(0, 1, 2, 3)]
    assert [r.positions for r in drop_unneeded(plan_runs(packets, [1, 7]), packets)] == [(0, 1, 2, 3, 4, 5, 8)]


def test_a_file_that_starts_without_an_entry_starts_at_its_first_packet() -> None:
    packets = table([0, 1, 2, 3], [0, 2])
    packets.entry[0] = Entry.OPEN
    assert [r.positions for r in plan_runs(packets, [1, 3])] == [(0, 1), (2, 3)]
