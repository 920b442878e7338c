"""The packet plan as arithmetic: which packets, and that no needed one is left out."""

from pathlib import Path

import av
import numpy as np
import pytest

from avion_dali.decode.packets import (
    PacketTable,
    UnorderedStreamError,
    drop_unneeded,
    droppable_packets,
    h264_slice_header,
    plan_runs,
    read_packets,
    spanning_run,
)


def table(pts: list[int], keys: list[int]) -> PacketTable:
    times = np.array(pts)
    keyframe = np.isin(np.arange(len(pts)), keys)
    return PacketTable([None] * len(pts), times, keyframe, np.argsort(times))


def test_a_run_begins_at_the_keyframe_and_ends_at_the_last_wanted_packet() -> None:
    # Decode order I P B B | I P B B, shown 0 3 1 2 | 4 7 5 6.
    plan = plan_runs(table([0, 3, 1, 2, 4, 7, 5, 6], [0, 4]), [1, 6])
    assert [(run.positions, run.wanted) for run in plan] == [((0, 1, 2), (2,)), ((4, 5, 6, 7), (7,))]


def test_untouched_gops_are_skipped() -> None:
    plan = plan_runs(table(list(range(12)), [0, 3, 6, 9]), [1, 10])
    assert [run.positions for run in plan] == [(0, 1), (9, 10)]


def test_unwanted_droppable_packets_are_left_out_and_wanted_ones_kept() -> None:
    droppable = np.array([False, False, True, True, False, False, True, True])
    (run,) = drop_unneeded(plan_runs(table([0, 3, 1, 2, 4, 7, 5, 6], [0]), [2, 5]), droppable)
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


def test_reading_stops_soon_after_the_last_wanted_frame(gop_videos: dict[str, Path]) -> None:
    with av.open(str(gop_videos["balanced"])) as container:
        stream = container.streams.video[0]
        known = read_packets(container.demux(stream), 10)
    with av.open(str(gop_videos["balanced"])) as container:
        whole = read_packets(container.demux(container.streams.video[0]), 89)
    assert 11 <= len(known.packets) <= 24
    assert len(whole.packets) == 90
    np.testing.assert_array_equal(known.pts[known.order[:11]], whole.pts[whole.order[:11]])


@pytest.mark.parametrize(("style", "share"), [("balanced", 7 / 8), ("no-b", 0), ("x264-default", 0.2)])
def test_non_reference_frames_are_found(gop_videos: dict[str, Path], style: str, share: float) -> None:
    with av.open(str(gop_videos[style])) as container:
        stream = container.streams.video[0]
        known = read_packets(container.demux(stream), 89)
        droppable = droppable_packets(known, plan_runs(known, range(90)), stream)
    assert droppable is not None
    assert not droppable[known.keyframe].any()
    if share == 0:
        assert not droppable.any()
    else:
        assert droppable.mean() > share * 0.85


def test_other_codecs_drop_nothing(gop_videos: dict[str, Path]) -> None:
    with av.open(str(gop_videos["vp9"])) as container:
        stream = container.streams.video[0]
        known = read_packets(container.demux(stream), 20)
        assert droppable_packets(known, plan_runs(known, [20]), stream) is None


def test_nal_parsing_in_both_byte_formats() -> None:
    reference, free = bytes([0x41, 9, 9]), bytes([0x01, 9, 9])  # slice with nal_ref_idc 2, and 0
    sei = bytes([0x06, 5])
    for payload in (reference, free):
        lengths = b"".join(len(nal).to_bytes(4, "big") + nal for nal in (sei, payload))
        start_codes = b"\0\0\0\1" + sei + b"\0\0\1" + payload
        assert h264_slice_header(memoryview(lengths), 4) == payload[0]
        assert h264_slice_header(memoryview(start_codes), 0) == payload[0]
    assert h264_slice_header(memoryview(b"\0\0\0\2" + sei), 4) is None


def test_shared_timestamps_are_refused(gop_videos: dict[str, Path]) -> None:
    with av.open(str(gop_videos["balanced"])) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size][:6]
    packets[3].pts = packets[2].pts
    with pytest.raises(UnorderedStreamError):
        read_packets(packets, 5)
