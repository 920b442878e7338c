"""Every fault of a file is found under its name, and sound files stay unblamed."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import make_videos as mv
import pytest
from checked_chunks import (
    BROKEN_LENGTH,
    BT601,
    build,
    lay_out,
    make_sound,
    packets,
    shown_as,
    target_of,
    write_over,
)
from chunk_folders import stored_file

from avion_dali.contracts import ChunkRef, PacketIndexRef
from avion_dali.data.probe import probe_chunk
from avion_dali.inspection.chunk_file import inspect_file
from avion_dali.inspection.findings import KINDS, Target


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames that nothing can be said against."""
    return make_sound(tmp_path_factory.mktemp("sound"))


def found(target: Target) -> list[str]:
    return [finding.kind for finding in inspect_file(target).findings]


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_chunk_has_no_findings(sound: Path, tmp_path: Path, deep: bool) -> None:
    report = inspect_file(Target(str(sound), deep))
    assert (report.findings, report.frame_size, report.deep) == ((), (64, 48), deep)
    assert report.stamp == (sound.stat().st_size, sound.stat().st_mtime_ns)
    chunks = lay_out(sound, tmp_path / "c", 1)
    for index in (True, False):
        assert found(target_of(build(chunks, tmp_path / f"m{index}", index=index), deep=deep)) == []


def test_no_style_is_called_broken(gop_videos: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        **gop_videos,
        "edit list": mv.edit_list_video(tmp_path / "e.mp4", frames=50, hidden=7),
        "cut open GOP": mv.remux(gop_videos["open-gop"], tmp_path / "cut.mp4", from_packet=5),
        "no index": mv.write_video(tmp_path / "m.mp4", frames=20, codec="mpeg4", options={}),
        "AVI with B-frames": mv.write_video(tmp_path / "b.avi", frames=20, options=mv.X264_FAST | {"bf": "2"}),
    }
    for name, path in cases.items():
        (tmp_path / name / "v").mkdir(parents=True)
        shutil.copyfile(path, tmp_path / name / "v" / f"0{path.suffix}")
        manifest = build(tmp_path / name, tmp_path / f"{name} manifest")
        for target in (
            Target(str(path), True),
            target_of(manifest, deep=False),
            target_of(manifest, deep=True),
        ):
            kinds = found(target)
            assert {KINDS[kind].severity for kind in kinds} <= {"note", "warning"}, name
            assert ("open-gop" in kinds) == (name in ("open-gop", "hevc", "cut open GOP")), name


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def other_video(path: Path) -> None:
    mv.write_video(path, frames=35, size=(64, 48), **BT601)


WHOLE_FILE_FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # how it is done: what is found without a manifest, and with one
    "removed": (Path.unlink, "missing", "missing"),
    "cut short": (cut, "truncated", "truncated"),
    "text": (lambda path: path.write_text("no video"), "undecodable", "truncated"),
    "empty": (lambda path: os.truncate(path, 0), "undecodable", "truncated"),
    "longer": (lambda path: path.write_text("no video" * 9999), "undecodable", "undecodable"),
    "another": (other_video, "", "changed"),
}


@pytest.mark.parametrize("fault", WHOLE_FILE_FAULTS)
@pytest.mark.parametrize("index", [True, False])
def test_faults_of_whole_files(sound: Path, tmp_path: Path, fault: str, index: bool) -> None:
    harm, alone, in_manifest = WHOLE_FILE_FAULTS[fault]
    manifest = build(lay_out(sound, tmp_path / "c", 1), tmp_path / "m", index=index)
    target = target_of(manifest, deep=False)
    harm(Path(target.path))
    for deep in (False, True):
        assert found(replace(target, deep=deep)) == [in_manifest]
        assert found(Target(target.path, deep)) == [alone] * bool(alone)


@pytest.mark.parametrize("number", [1, 17, 39])
def test_damaged_packets_are_found_by_decoding_and_named(sound: Path, tmp_path: Path, number: int) -> None:
    chunks = lay_out(sound, tmp_path / "c", 1)
    indexed, plain = build(chunks, tmp_path / "m"), build(chunks, tmp_path / "p", index=False)
    path = chunks / "video" / "0.mp4"
    write_over(path, number, BROKEN_LENGTH)
    frame_id = shown_as(sound, number)
    for manifest, kind in ((indexed, "checksum"), (plain, "undecodable")):
        (finding,) = inspect_file(target_of(manifest, deep=True)).findings
        assert (finding.kind, finding.frame_id) == (kind, frame_id)
    (finding,) = inspect_file(Target(str(path), True)).findings
    assert (finding.kind, finding.frame_id) == ("undecodable", frame_id)
    assert found(target_of(indexed, deep=False)) == found(Target(str(path), False)) == []


def test_the_first_keyframe_is_looked_at_by_every_check(sound: Path, tmp_path: Path) -> None:
    manifest = build(lay_out(sound, tmp_path / "c", 1), tmp_path / "m")
    write_over(tmp_path / "c" / "video" / "0.mp4", 0, BROKEN_LENGTH)
    assert [found(target_of(manifest, deep=deep)) for deep in (False, True)] == [["checksum"]] * 2


def test_one_flipped_bit_is_found_through_the_index(sound: Path, tmp_path: Path) -> None:
    chunks = lay_out(sound, tmp_path / "c", 1)
    manifest, path = build(chunks, tmp_path / "m"), chunks / "video" / "0.mp4"
    write_over(path, 12, bytes([bytes(packets(path)[12])[-1] ^ 1]), at=packets(path)[12].size - 1)
    assert found(target_of(manifest, deep=False)) == []
    (finding,) = inspect_file(target_of(manifest, deep=True)).findings
    assert (finding.kind, finding.frame_id) == ("checksum", shown_as(sound, 12))


def test_other_counts_and_sizes_than_the_manifest_says(sound: Path, tmp_path: Path) -> None:
    chunks = lay_out(sound, tmp_path / "c", 1)
    for index in (True, False):
        target = target_of(build(chunks, tmp_path / f"m{index}", index=index), deep=False)
        assert isinstance(target.ref, ChunkRef)
        for change, kind in (
            ({"num_frames": 41}, "wrong-count"),
            ({"num_frames": 39}, "wrong-count"),
            ({"width": 128}, "changed"),
        ):
            assert found(replace(target, ref=replace(target.ref, **change))) == [kind]


def test_a_replaced_file_of_the_same_length_is_noticed_by_its_header(sound: Path, tmp_path: Path) -> None:
    manifest = build(lay_out(sound, tmp_path / "c", 1), tmp_path / "m")
    path = tmp_path / "c" / "video" / "0.mp4"
    mv.write_video(path, frames=10, size=(64, 48), options=mv.X264_FAST | {"preset": "ultrafast"}, **BT601)
    room = sound.stat().st_size - path.stat().st_size
    with path.open("ab") as file:  # a free box fills the rest
        file.write(room.to_bytes(4, "big") + b"free" + bytes(room - 8))
    assert found(target_of(manifest, deep=False)) == ["changed"]


def test_a_picture_that_changes_its_size(sound: Path, tmp_path: Path) -> None:
    """Each picture of MJPEG says its own size; the container says the first one's."""
    small, large = (
        mv.write_video(tmp_path / f"{w}.mov", frames=5, size=(w, 48), codec="mjpeg", pix_fmt="yuvj420p")
        for w in (64, 80)
    )
    path = tmp_path / "both.mov"
    with av.open(str(path), "w") as writer, av.open(str(small)) as like:
        stream = writer.add_stream_from_template(like.streams.video[0])
        for number, packet in enumerate([*packets(small), *packets(large)]):
            packet.pts = packet.dts = number * packet.duration
            packet.stream = stream
            writer.mux(packet)
    finding = inspect_file(Target(str(path), True)).findings[-1]
    assert (finding.kind, finding.frame_id) == ("undecodable", 5)
    assert "80x48" in finding.detail


def test_damaged_packet_indexes(sound: Path, tmp_path: Path) -> None:
    manifest = build(lay_out(sound, tmp_path / "c", 1), tmp_path / "m")
    path, target = stored_file(manifest, "packets.bin"), target_of(manifest, deep=False)
    whole = path.read_bytes()
    for at in (0, 20, len(whole) - 10):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        assert found(target) == ["index"], at
    path.write_bytes(whole[: len(whole) // 2])
    assert found(target) == ["index"]


ODD_VIDEOS = {
    "rotation": {"rotation": 90},
    "color": {"colorspace": 1, "color_range": 1},
    "color: full": {"colorspace": 6, "color_range": 2},
    "color: 4:4:4": {"pix_fmt": "yuv444p"},
    "nvdec-size": {"size": (100, 76)},
    "variable-rate": {"times": [i / 30 for i in range(21) if i != 9]},
    "long-gop": {"frames": 40, "fps": 5, "gop": 250},
    "untagged": {"colorspace": None},
}


@pytest.mark.parametrize("name", ODD_VIDEOS)
def test_what_decoders_would_get_wrong(tmp_path: Path, name: str) -> None:
    settings = {"frames": 20, "size": (64, 48), "gop": 10, **BT601, **ODD_VIDEOS[name]}
    path = mv.write_video(tmp_path / "0.mp4", **settings)
    expected = [name.partition(":")[0]]
    assert found(Target(str(path), False)) == expected
    assert not any(finding.is_error for finding in inspect_file(Target(str(path), True)).findings)
    facts = probe_chunk(path, index=True)
    (tmp_path / "packets").write_bytes(facts.packet_index)
    place = PacketIndexRef(str(tmp_path / "packets"), 0, len(facts.packet_index))
    ref = ChunkRef(str(path), facts.size_bytes, facts.num_frames, facts.width, facts.height, place)
    assert found(Target(str(path), False, ref, facts.fps, facts.is_cfr)) == expected
