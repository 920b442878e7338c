"""Every way of reading must give the frames of plain sequential decoding, bit for bit."""

import os
from pathlib import Path

import av
import make_videos
import numpy as np
import pytest

from avion_dali.contracts import ChunkRef, ClipPart, DecodeError
from avion_dali.data.probe import probe_chunk
from avion_dali.decode.reading import read_everything, read_planned, read_spanned

STYLES = [
    "x264-default",
    "x264-gop30",
    "balanced",
    "no-b",
    "intra",
    "open-gop",
    "vp9",
    "vp9-mp4",
    "mjpeg",
    "hevc",
    "mkv",
    "mov",
    "avi",
]
FRAME_SETS = 30


def chunk_ref(path: Path) -> ChunkRef:
    facts = probe_chunk(path)
    return ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height)


def raw_frames(path: Path) -> list[np.ndarray]:
    """All frames as stored (YUV), by FFmpeg alone."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray() for frame in container.decode(container.streams.best("video"))]


def frame_sets(num_frames: int, seed: int) -> list[tuple[int, ...]]:
    """First, last, neighbours, all, two GOPs apart, and random sets."""
    rng = np.random.default_rng(seed)
    sets = [(0,), (num_frames - 1,), (0, num_frames - 1), (31, 32, 33), (29, 30), (5, num_frames - 5)]
    while len(sets) < FRAME_SETS:
        first = int(rng.integers(0, num_frames - 1))
        span = int(rng.integers(1, num_frames - first + 1))
        picks = rng.choice(span, size=min(span, int(rng.integers(1, 9))), replace=False)
        sets.append(tuple(sorted((picks + first).tolist())))
    return sets


def assert_exact(path: Path, seed: int) -> None:
    expected, ref = raw_frames(path), chunk_ref(path)
    assert ref.num_frames == len(expected)
    for ids in frame_sets(ref.num_frames, seed):
        part = ClipPart(ref, ids)
        for read in (read_planned, read_spanned):
            frames = read(part)
            assert len(frames) == len(ids)
            for frame_id, frame in zip(ids, frames, strict=True):
                np.testing.assert_array_equal(
                    frame.to_ndarray(), expected[frame_id], err_msg=f"{path.name} {read.__name__} {ids}"
                )
    (frame,) = read_everything(ClipPart(ref, (7,)))
    np.testing.assert_array_equal(frame.to_ndarray(), expected[7])


@pytest.mark.parametrize("style", STYLES)
def test_frames_equal_sequential_decoding(gop_videos: dict[str, Path], style: str) -> None:
    assert_exact(gop_videos[style], seed=STYLES.index(style))


def test_edit_list_hides_frames_from_every_reader(tmp_path: Path) -> None:
    path = make_videos.edit_list_video(tmp_path / "edited.mp4", frames=90, hidden=10)
    assert make_videos.frame_numbers(path)[0] == 10
    assert_exact(path, seed=1)


def test_open_gop_started_in_the_middle(gop_videos: dict[str, Path], tmp_path: Path) -> None:
    """A file that begins with an open GOP's keyframe has leading frames nobody can decode."""
    with av.open(str(gop_videos["open-gop"])) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
        second_key = [i for i, p in enumerate(packets) if p.is_keyframe][1]
        start = -int(packets[second_key].pts)
    path = make_videos.remux(gop_videos["open-gop"], tmp_path / "cut.mkv", from_packet=second_key, shift=start)
    assert_exact(path, seed=4)
    assert make_videos.frame_numbers(path)[0] > 10


def test_variable_rate_and_late_start(tmp_path: Path) -> None:
    times = np.cumsum(np.tile([1, 3, 2], 20)) / 60
    path = make_videos.write_video(tmp_path / "vfr.mp4", frames=60, times=times.tolist(), start=7.5, gop=20)
    assert_exact(path, seed=2)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [("gone", "missing"), ("grown", "changed"), ("other size", "changed"), ("text", "corrupt")],
)
def test_damage_is_typed(gop_videos: dict[str, Path], tmp_path: Path, damage: str, kind: str) -> None:
    path = tmp_path / "chunk.mp4"
    path.write_bytes(gop_videos["balanced"].read_bytes())
    ref = chunk_ref(path)
    if damage == "gone":
        path.unlink()
    elif damage == "grown":
        path.write_bytes(path.read_bytes() + b"\0" * 9)
    elif damage == "other size":
        make_videos.write_video(path, frames=30, size=(64, 48))
    else:
        path.write_bytes(b"this is not a video\n" * 50)
    with pytest.raises(DecodeError) as caught:
        read_planned(ClipPart(ref, (3, 9)))
    assert (caught.value.kind, caught.value.path, caught.value.frame_ids) == (kind, str(path), (3, 9))


def test_truncated_file_of_the_recorded_size_is_corrupt(tmp_path: Path) -> None:
    path = make_videos.write_video(
        tmp_path / "chunk.mp4", frames=90, gop=30, container_options={"movflags": "faststart"}
    )
    ref = chunk_ref(path)
    path.write_bytes(path.read_bytes()[: ref.size_bytes // 2])
    ref = ChunkRef(ref.path, os.path.getsize(path), ref.num_frames, ref.width, ref.height)
    assert len(read_planned(ClipPart(ref, (0, 5)))) == 2  # its beginning is whole
    with pytest.raises(DecodeError, match="corrupt"):
        read_planned(ClipPart(ref, (85, 88)))


def test_destroyed_payload_is_noticed(gop_videos: dict[str, Path], tmp_path: Path) -> None:
    """Zeroed slice data: the decoder must not paint over it silently."""
    data = bytearray(gop_videos["intra"].read_bytes())
    with av.open(str(gop_videos["intra"])) as container:
        packet = [p for p in container.demux(container.streams.video[0]) if p.size][40]
        start, size = packet.pos, packet.size
    data[start + size // 4 : start + size] = bytes(size - size // 4)
    path = tmp_path / "chunk.mp4"
    path.write_bytes(data)
    ref = chunk_ref(path)
    with pytest.raises(DecodeError, match="corrupt"):
        read_planned(ClipPart(ref, (40,)))
    (frame,) = read_planned(ClipPart(ref, (41,)))
    assert make_videos.read_frame_number(frame.to_ndarray(format="rgb24")) == 41
