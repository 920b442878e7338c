"""Faults of files and disks through the real pool: a typed error in bounded time; the next clip is right."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import make_videos as mv
import numpy as np
import pytest

from avion_dali.contracts import ChunkRef, ClipPart, DecodeError, PacketIndexRef
from avion_dali.data.indexing import make_packet
from avion_dali.data.probe import probe_chunk
from avion_dali.decode import cpu_fused
from avion_dali.decode.reading import read_planned
from avion_dali.loading.pool import WorkerPool
from avion_dali.loading.ring import SharedRing
from avion_dali.loading.worker import decode_into
from benchmarks.studies import mutations
from benchmarks.studies.mutations import Source, Trial

SIZE = (96, 64)
HEVC = mv.HEVC_FAST | {
    "x265-params": "log-level=none:pools=none:frame-threads=1:keyint=24:bframes=3:rc-lookahead=5"
}
BALANCED = {"preset": "veryfast", "threads": "1", "x264-params": mv.BALANCED}
ENCODINGS = {
    "h264": ("mp4", "libx264", BALANCED),
    "hevc": ("mp4", "libx265", HEVC),
    "vp9": ("webm", "libvpx-vp9", mv.VP9_FAST),
}
MUTATED_FILES, CLIPS = 126, 2000


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder = tmp_path_factory.mktemp("sources")
    return [
        mutations.open_source(
            codec,
            mv.write_video(folder / f"{codec}.{ending}", frames=60, size=SIZE, codec=encoder, options=options),
        )
        for codec, (ending, encoder, options) in ENCODINGS.items()
    ]


def damaged_clips(sources: list[Source], folder: Path) -> Iterator[Trial]:
    """Clips of `MUTATED_FILES` damaged files and as many damaged indices, sound clips between them."""
    kinds = list(mutations.KINDS)
    for number in range(MUTATED_FILES):
        source, kind = sources[number % len(sources)], kinds[number // len(sources) % len(kinds)]
        yield from mutations.trials(source, folder, kind, seed=number)
        if kind in mutations.INDEX_KINDS:
            yield from mutations.index_trials(source, folder, kind, seed=number)


def test_no_damage_passes_as_good_through_an_index_and_none_ends_the_run(
    sources: list[Source], tmp_path: Path
) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    wrong = []
    for trial, outcome, cause in mutations.outcomes(
        damaged_clips(sources, tmp_path), workers=2, clip_timeout_s=2.0
    ):
        _, kind, way = trial.labels
        label = "sound" if kind == "sound" else way
        counts[label, outcome] += 1
        assert outcome in ("right", "wrong") or cause
        if outcome == "wrong" and label != "no index":
            wrong.append(trial)
    assert not wrong
    assert counts["sound", "right"] == 2 * MUTATED_FILES
    # The trial is one: most damage hits, and what is hit is noticed.
    assert counts["index", "corrupt"] > MUTATED_FILES / 3
    assert counts["damaged index", "corrupt"] > MUTATED_FILES / 3
    assert counts["no index", "corrupt"] > MUTATED_FILES / 3


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def same_size(data: bytes) -> Callable[[Path], None]:
    """Overwrite a file with some bytes again and again, up to its own size."""

    def spoil(path: Path) -> None:
        size = path.stat().st_size
        path.write_bytes((data * (size // len(data) + 1))[:size])

    return spoil


def replace_by_audio(path: Path) -> None:
    """A file without pictures."""
    path.unlink()
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        container.mux(list(mv.silence(stream, 1.0)))


def replace_by_other_video(path: Path) -> None:
    path.unlink()
    mv.write_video(path, frames=5, size=(64, 48), codec="mpeg4", options={})


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def hide_behind_file(path: Path) -> None:
    """The folder becomes a file."""
    path.unlink()
    path.parent.rmdir()
    path.parent.write_bytes(b"")


def make_pipe(path: Path) -> None:
    """A pipe that nobody writes into: opening it never returns."""
    path.unlink()
    os.mkfifo(path)


# What happens to a chunk between plan and read; kind of failure with an index and without.
FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "vanished": (Path.unlink, "missing", "missing"),
    "cut": (cut_in_half, "changed", "corrupt"),
    "empty": (empty, "changed", "corrupt"),
    "text": (same_size(b"this is not a video\n"), "corrupt", "corrupt"),
    "zeros": (same_size(b"\0"), "corrupt", "corrupt"),
    "audio": (replace_by_audio, "changed", "corrupt"),
    "other video": (replace_by_other_video, "changed", "changed"),
    "folder": (replace_by_folder, "corrupt", "corrupt"),
    "loop of links": (replace_by_loop, "corrupt", "corrupt"),
    "no folder": (hide_behind_file, "missing", "missing"),
    "pipe": (make_pipe, "timeout", "timeout"),
}


def test_what_happens_between_plan_and_read_is_named(sources: list[Source], tmp_path: Path) -> None:
    source, given = sources[0], []
    ids = (3, 17, 31, 50)
    expected = mutations.decoded(source.request(ids))
    for number, (name, (damage, *_)) in enumerate(FAULTS.items()):
        path = tmp_path / str(number) / "0.mp4"
        path.parent.mkdir()
        path.write_bytes(Path(source.ref.path).read_bytes())
        damage(path)
        ref = replace(source.ref, path=str(path))
        for way, chunk in (("index", ref), ("no index", replace(ref, index=None))):
            given.append(Trial((name, way), source.request(ids, chunk), expected))
            given.append(Trial(("sound", way), source.request(ids), expected))
    found = {}
    for trial, outcome, cause in mutations.outcomes(given, workers=1, clip_timeout_s=1.5, places=4):
        if trial.labels[0] == "sound":
            assert outcome == "right"
        else:
            assert cause
            found[trial.labels] = outcome
    assert found == {
        (name, way): kind
        for name, (_, *kinds) in FAULTS.items()
        for way, kind in zip(("index", "no index"), kinds, strict=True)
    }


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs permissions as POSIX has them")
def test_a_folder_without_permission_is_missing(sources: list[Source], tmp_path: Path) -> None:
    path = tmp_path / "closed" / "0.mp4"
    path.parent.mkdir()
    path.write_bytes(Path(sources[0].ref.path).read_bytes())
    path.parent.chmod(0)
    mutations.decoded(sources[0].request((3,)))  # the index file is now open, as a worker has it
    user = os.geteuid()
    if user == 0:  # root may read everything
        os.seteuid(65534)
    try:
        for ref in (
            replace(sources[0].ref, path=str(path), index=None),
            replace(sources[0].ref, path=str(path)),
        ):
            with pytest.raises(DecodeError, match="missing: Permission denied"):
                read_planned(ClipPart(ref, (3,)))
    finally:
        os.seteuid(user)
        path.parent.chmod(0o700)


def test_a_file_that_shrinks_while_it_is_read_is_corrupt(
    sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.mp4"
    path.write_bytes(Path(sources[0].ref.path).read_bytes())
    facts = os.fstat

    def shrink_after(descriptor: int) -> os.stat_result:
        result = facts(descriptor)
        os.truncate(path, 700)
        return result

    monkeypatch.setattr(os, "fstat", shrink_after)
    with pytest.raises(DecodeError, match="corrupt: its bytes from"):
        read_planned(ClipPart(replace(sources[0].ref, path=str(path)), (50,)))


def test_a_disk_that_fails_is_corrupt(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.pread
    index_file = sources[0].ref.index and os.stat(sources[0].ref.index.path).st_ino

    def fail(descriptor: int, count: int, offset: int) -> bytes:
        if os.fstat(descriptor).st_ino != index_file:
            raise OSError(5, "Input/output error")
        return read(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DecodeError, match="corrupt: Input/output error"):
        read_planned(ClipPart(sources[0].ref, (3,)))


def test_one_frame_and_no_keyframe_at_the_start(sources: list[Source], tmp_path: Path) -> None:
    single = mutations.open_source("one", mv.write_video(tmp_path / "one.mp4", frames=1, size=SIZE))
    for ref in (single.ref, replace(single.ref, index=None)):
        (frame,) = read_planned(ClipPart(ref, (0,)))
        assert mv.read_frame_number(frame.to_ndarray(format="rgb24")) == 0
    late = mutations.open_source("late", mv.remux(Path(sources[0].ref.path), tmp_path / "l.mp4", from_packet=4))
    assert late.ref.num_frames == 28  # what comes before the second GOP leans on pictures that are not there
    for ref in (late.ref, replace(late.ref, index=None)):
        frames = read_planned(ClipPart(ref, (0, 27)))
        assert [mv.read_frame_number(f.to_ndarray(format="rgb24")) for f in frames] == [32, 59]
    none = mv.remux(Path(sources[0].ref.path), tmp_path / "none.mp4", from_packet=40)
    with pytest.raises(DecodeError, match="corrupt: contains no decodable frame"):
        probe_chunk(none)
    with pytest.raises(DecodeError, match="corrupt: frame 5 could not be decoded"):
        read_planned(ClipPart(ChunkRef(str(none), none.stat().st_size, 20, *SIZE), (5,)))


def test_a_file_cut_inside_a_reordered_group_lacks_frames(sources: list[Source], tmp_path: Path) -> None:
    """The last picture is decoded before those that are shown before it, and these are gone."""
    with av.open(sources[0].ref.path) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        last_reference = max(i for i, p in enumerate(packets[:30]) if mv.is_reference(p))
    path = tmp_path / "cut.mp4"
    with av.open(sources[0].ref.path) as reader, av.open(str(path), "w") as writer:
        target = writer.add_stream_from_template(reader.streams.video[0])
        for packet in list(reader.demux(video=0))[: last_reference + 1]:
            packet.stream = target
            writer.mux(packet)
    ref = ChunkRef(str(path), path.stat().st_size, 60, *SIZE)
    assert len(read_planned(ClipPart(ref, (0, 9)))) == 2
    with pytest.raises(DecodeError, match="corrupt: ends after"):
        read_planned(ClipPart(ref, (last_reference,)))


def test_decoders_find_zeros_behind_a_packet() -> None:
    """They read beyond its end; what happens to lie in memory there would change the pictures."""
    ctypes = pytest.importorskip("ctypes")
    for size in (1, 30, 1000):
        packet = make_packet(b"\xff" * size, 7)
        assert (packet.pts, bytes(packet)) == (7, b"\xff" * size)
        assert ctypes.string_at(packet.buffer_ptr + size, 64) == bytes(64)


def test_an_index_of_another_file_gives_no_frames(sources: list[Source]) -> None:
    """As when `packets.bin` and the tables do not belong together."""
    for source, other in zip(sources, sources[1:] + sources[:1], strict=True):
        assert other.ref.index is not None
        ref = replace(source.ref, index=other.ref.index)
        with pytest.raises(DecodeError, match="corrupt"):
            read_planned(ClipPart(ref, (3,)))
        place = PacketIndexRef(other.ref.index.path, 7, other.ref.index.num_bytes - 7)
        with pytest.raises(DecodeError, match="corrupt: its packet index"):
            read_planned(ClipPart(replace(source.ref, index=place), (3,)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_thousands_of_clips_leave_no_trace_in_a_worker(sources: list[Source]) -> None:
    """With index and without, sound and damaged: a worker's memory stays where it is."""
    rng = np.random.default_rng(0)
    requests = []
    for source in sources:
        bad = replace(source.ref, size_bytes=1)
        refs = [source.ref] * 14 + [replace(source.ref, index=None)] * 2 + [bad]
        requests += [source.request(source.random_ids(rng), ref) for ref in refs]
    shape = (1, mutations.FRAMES_PER_CLIP, mutations.FRAME_SIZE, mutations.FRAME_SIZE, 3)
    pool, ring = WorkerPool(workers=1, timeout_s=5.0), SharedRing(1, (8, *shape))
    memory_kb = []
    clips = (requests[i % len(requests)] for i in range(CLIPS))
    while batch := list(islice(clips, 8)):
        done = [
            pool.schedule(decode_into, cpu_fused.decode_clip, request, ring.place(0, i))
            for i, request in enumerate(batch)
        ]
        failed = [future.exception() is not None for future in done]
        assert failed == [request.parts[0].chunk.size_bytes == 1 for request in batch]
        memory_kb.append(private_memory_kb(multiprocessing.active_children()[0].pid))
    pool.close()
    ring.close()
    assert memory_kb[-1] - memory_kb[len(memory_kb) // 4] < 4000


def private_memory_kb(pid: int | None) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
