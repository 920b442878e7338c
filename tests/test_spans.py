"""Which chunks a time span touches, and every reason to refuse one."""

from fractions import Fraction

import numpy as np
import pytest
from chunk_folders import NTSC_30, chunk_row, chunk_rows

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Chunk
from avion_dali.datasets.spans import ChunkLookup, SpanError

# Rows 0-2 are video "a", 3-5 "b" (29.97 fps), 6 "c".
TABLE = [
    *chunk_rows("a.mp4", (450, 450, 300), fps=30),
    *chunk_rows("b.mp4", (450, 450, 449), fps=NTSC_30),
    chunk_row("c.mp4", 0, num_frames=30),
]


def without(*rows: int) -> ChunkLookup:
    return ChunkLookup([chunk for row, chunk in enumerate(TABLE) if row not in rows])


@pytest.mark.parametrize(
    ("video", "start", "end", "expected"),
    [
        ("a.mp4", 0, 1, (0, 1, 1)),
        ("a.mp4", 14, 16, (0, 2, 16)),
        ("a.mp4", 1, 39, (0, 3, 39)),
        ("a.mp4", 0, 15, (0, 1, 15)),  # ends where the next chunk begins: not touched
        ("a.mp4", 15, 15, (1, 1, 15)),
        ("a.mp4", 15, 30, (1, 1, 30)),
        ("a.mp4", 0, 0, (0, 1, 0)),
        ("a.mp4", 39, 40.9, (2, 1, 40)),  # rounded past the end: clamped
        ("a.mp4", 39.99, 40, (2, 1, 40)),
        ("b.mp4", 29.5, 31, (4, 2, 31)),
        ("c.mp4", 0.5, 0.6, (6, 1, 0.6)),
    ],
)
def test_rows_of_a_span(video: str, start: float, end: float, expected: tuple[int, int, float]) -> None:
    assert ChunkLookup(TABLE).locate(video, start, end) == pytest.approx(expected)


def test_every_second_of_every_video_finds_the_chunk_that_holds_it() -> None:
    lookup = ChunkLookup(TABLE)
    for video in ("a.mp4", "b.mp4"):
        rows = [row for row, chunk in enumerate(TABLE) if chunk.video == video]
        for start in np.arange(0, 39.5, 0.37):
            first, count, _ = lookup.locate(video, float(start), float(start) + 0.3)
            holding = [r for r in rows if TABLE[r].start_s <= start]
            assert first == holding[-1]
            assert TABLE[first + count - 1].end_s + 0.1 >= start + 0.3


@pytest.mark.parametrize(
    ("video", "start", "end", "reason"),
    [
        ("a.mp4", 5, 4, "ends at 4 s, before its start at 5 s"),
        ("a.mp4", -0.5, 4, "seconds >= 0"),
        ("a.mp4", float("nan"), 4, "seconds >= 0"),
        ("a.mp4", 0, float("nan"), "seconds >= 0"),
        ("a.mp4", 0, float("inf"), "seconds >= 0"),
        ("z.mp4", 0, 1, "'z.mp4' has no chunks"),
        ("", 0, 1, "no chunks"),
        ("a.mp4", 40, 40, "past the end of the video (40.00 s)"),
        ("a.mp4", 41, 42, "past the end"),
        ("a.mp4", 30, 41.1, "past the end"),
        ("c.mp4", 0.5, 2.5, "past the end"),
    ],
)
def test_unusable_spans_say_why(video: str, start: float, end: float, reason: str) -> None:
    with pytest.raises(SpanError) as caught:
        ChunkLookup(TABLE).locate(video, start, end)
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["a.mp4", "a", "a.MOV"])
def test_a_video_is_found_by_name_with_or_without_ending(name: str) -> None:
    assert ChunkLookup(TABLE).locate(name, 1, 2) == (0, 1, 2)


def test_a_video_in_a_folder_is_found_by_its_path_or_its_name() -> None:
    lookup = ChunkLookup([chunk_row("P01/P01_01.MP4", 0), chunk_row("P02/P02_01.MP4", 0)])
    for name in ("P02/P02_01.MP4", "P02_01"):
        assert lookup.locate(name, 1, 2) == (1, 1, 2)


def test_an_ambiguous_name_lists_what_it_could_be() -> None:
    lookup = ChunkLookup([chunk_row("x/0001.mp4", 0), chunk_row("y/0001.mp4", 0)])
    with pytest.raises(SpanError, match=r"x/0001\.mp4, y/0001\.mp4"):
        lookup.locate("0001", 0, 1)
    assert lookup.locate("y/0001.mp4", 0, 1) == (1, 1, 1)


@pytest.mark.parametrize("name", ["cam1/0001", "cam1/0001.mp4", "0001.part2"])
def test_another_video_is_never_taken_instead(name: str) -> None:
    lookup = ChunkLookup([chunk_row("cam2/0001.mp4", 0)])
    with pytest.raises(SpanError, match="no chunks"):
        lookup.locate(name, 0, 1)


@pytest.mark.parametrize(
    ("missing", "start", "end", "reason"),
    [
        (0, 1, 2, "the chunk of 0-15 s is missing"),
        (0, 14, 16, "the chunk of 0-15 s is missing"),
        (1, 16, 17, "the chunk of 15-30 s is missing"),
        (1, 29, 31, "the chunk of 15-30 s is missing"),
        (1, 14, 31, "the chunk of 15-30 s is missing"),
        (1, 1, 39, "the chunk of 15-30 s is missing"),
        (2, 29, 31.5, "past the end of the video (30.00 s)"),
    ],
)
def test_a_missing_chunk_is_a_reason_and_never_a_shorter_clip(
    missing: int, start: float, end: float, reason: str
) -> None:
    with pytest.raises(SpanError) as caught:
        without(missing).locate("a.mp4", start, end)
    assert reason in str(caught.value)


@pytest.mark.parametrize(("start", "end"), [(10, 20), (1, 29.9), (14.9, 16), (15.2, 16)])
def test_a_span_that_ends_in_a_missing_chunk_is_refused(start: float, end: float) -> None:
    with pytest.raises(SpanError, match="missing"):
        without(1).locate("a.mp4", start, end)


def test_a_span_wholly_in_the_beginning_of_a_missing_chunk_is_refused() -> None:
    with pytest.raises(SpanError, match="missing"):
        without(1).locate("a.mp4", 15.1, 15.4)


def test_spans_beside_a_missing_chunk_are_still_usable() -> None:
    assert without(1).locate("a.mp4", 1, 15) == (0, 1, 15)
    assert without(1).locate("a.mp4", 30, 31) == (1, 1, 31)
    assert without(0).locate("a.mp4", 15, 31) == (0, 2, 31)
    assert without(0, 1, 2).locate("b.mp4", 1, 2) == (0, 1, 2)


def test_a_chunk_that_misses_its_last_frame_is_no_gap() -> None:
    lookup = ChunkLookup(chunk_rows("v", (449, 449, 449), fps=30))
    assert lookup.locate("v", 14, 31) == (0, 3, 31)
    assert lookup.locate("v", 14.99, 14.995) == (0, 1, 14.995)


def test_chunks_of_several_sizes_cannot_make_one_clip() -> None:
    lookup = ChunkLookup([chunk_row("v", 0), chunk_row("v", 15, size=(640, 480))])
    assert lookup.locate("v", 1, 2) == (0, 1, 2)
    assert lookup.locate("v", 16, 17) == (1, 1, 17)
    with pytest.raises(SpanError, match="differ in frame size"):
        lookup.locate("v", 14, 16)


def test_chunks_of_several_lengths_and_rates() -> None:
    chunks = [chunk_row("v", 0, num_frames=100, fps=Fraction(25)), chunk_row("v", 4, num_frames=600, fps=60)]
    assert ChunkLookup(chunks).locate("v", 3.9, 4.1) == (0, 2, 4.1)
    assert ChunkLookup(chunks).locate("v", 4.0, 13.9) == (1, 1, 13.9)


def test_no_second_of_a_video_is_read_twice() -> None:
    chunks = [chunk_row("v", start) for start in (0, 0, 15, 15)]
    with pytest.raises(UserError, match="two chunks that start at the same second"):
        ChunkLookup(chunks)


def test_the_end_of_a_variable_rate_video_is_its_last_timestamp() -> None:
    chunk: Chunk = chunk_row("v", 0, num_frames=3, fps=1, frame_times=np.array([0.0, 5.0, 10.0]))
    assert ChunkLookup([chunk]).locate("v", 10.5, 11.5) == (0, 1, 11.0)
    with pytest.raises(SpanError, match=r"11\.00 s"):
        ChunkLookup([chunk]).locate("v", 11.0, 11.0)


def test_an_empty_table_knows_no_video() -> None:
    with pytest.raises(SpanError, match="no chunks"):
        ChunkLookup([]).locate("a", 0, 1)


def test_reasons_have_kinds_that_reports_count_by() -> None:
    lookup = ChunkLookup([chunk for row, chunk in enumerate(TABLE) if row != 1])
    for (video, start, end), kind in {
        ("a.mp4", 5, 4): "bad times",
        ("a.mp4", -1, 4): "bad times",
        ("z.mp4", 0, 1): "unknown video",
        ("a.mp4", 50, 51): "past the end",
        ("a.mp4", 14, 16): "missing chunk",
    }.items():
        with pytest.raises(SpanError) as caught:
            lookup.locate(video, start, end)
        assert caught.value.kind == kind


def test_a_whole_video_is_all_of_its_chunks_or_none() -> None:
    assert ChunkLookup(TABLE).locate_whole("a") == (0, 3, 40)
    first, count, end_s = ChunkLookup(TABLE).locate_whole("b.mp4")
    assert (first, count) == (3, 3)
    assert end_s == pytest.approx(TABLE[5].end_s)
    for missing in (0, 1):
        with pytest.raises(SpanError, match="is missing"):
            without(missing).locate_whole("a.mp4")


def test_names_are_known_by_their_short_forms_and_had_by_their_own() -> None:
    lookup = ChunkLookup([chunk_row("P01/P01_01.MP4", 0)])
    for name in ("P01/P01_01.MP4", "P01/P01_01", "P01_01", "P01_01.MP4"):
        assert lookup.knows(name)
        assert lookup.has(name) == (name == "P01/P01_01.MP4")
    for name in ("P02/P01_01", "P01", "", "P01_0"):
        assert not lookup.knows(name)


@pytest.mark.parametrize(("start", "end"), [(30, 31), (30, 30), (29, 30.4), (29, 31.5), (35, 90), (30.1, 30.2)])
def test_a_span_that_reaches_an_unusable_last_chunk_says_so(start: float, end: float) -> None:
    lookup = ChunkLookup(TABLE[:2], lost=[("a.mp4", 45.0), ("a.mp4", 30.0), ("a.mp4", 15.0), ("z", 0.0)])
    with pytest.raises(SpanError, match="the chunk that begins at 30 s cannot be used") as caught:
        lookup.locate("a", start, end)
    assert caught.value.kind == "missing chunk"


def test_spans_before_an_unusable_last_chunk_are_still_usable() -> None:
    lookup = ChunkLookup(TABLE[:2], lost=[("a.mp4", 30.0)])
    assert lookup.locate("a", 1, 30) == (0, 2, 30)
    short = ChunkLookup(chunk_rows("v", (449,), fps=30), lost=[("v", 15.0)])
    assert short.locate("v", 1, 15) == pytest.approx((0, 1, 449 / 30))  # it misses its last frame


def test_a_whole_video_with_an_unusable_last_chunk_is_none() -> None:
    with pytest.raises(SpanError, match="cannot be used") as caught:
        ChunkLookup(TABLE[:2], lost=[("a.mp4", 30.0)]).locate_whole("a.mp4")
    assert caught.value.kind == "missing chunk"


def test_a_video_of_unusable_chunks_only_is_known_and_cannot_be_had() -> None:
    lookup = ChunkLookup(TABLE, lost=[("P01/z.mp4", 0.0)])
    assert lookup.knows("z") and not lookup.has("P01/z.mp4")
    with pytest.raises(SpanError, match="no chunks that can be used") as caught:
        lookup.locate("z", 0, 1)
    assert caught.value.kind == "missing chunk"
