"""Damaged recordings: what is whole is kept, what is lost is named, and captions there say so."""

import json
from collections.abc import Callable
from pathlib import Path

import av
import field_videos as fv
import make_videos as mv
import numpy as np
import pytest
from field_videos import Style

from avion_dali.cli.main import main
from avion_dali.contracts import ClipPart, DecodeError
from avion_dali.data.chunking import ChunkSettings, chunk_video
from avion_dali.data.probe import probe_chunk
from avion_dali.data.sidecar import read_sidecar
from avion_dali.datasets import building
from avion_dali.inspection import reader_comparison
from avion_dali.inspection.chunk_file import inspect_file
from avion_dali.inspection.findings import KINDS, Target

SETTINGS = ChunkSettings("compat", chunk_seconds=1, short_side=96)
COUNT = 150

STYLES = {
    "h264.mkv": Style(),
    "h264.mp4": Style(),
    "h264.ts": Style(),
    "h264.flv": Style(),
    "hevc.mkv": Style("libx265", options={"x265-params": "log-level=none:keyint=10:min-keyint=10"}),
    "mpeg4.mkv": Style("mpeg4", options={"qscale": "2"}),
    "mpeg2.ts": Style("mpeg2video", options={"qscale": "2"}),
    "mpeg2.mpg": Style("mpeg2video", options={"qscale": "2"}, container="mpeg"),
    "mjpeg.mov": Style("mjpeg", pix_fmt="yuvj420p", options={"qscale": "3"}),
}


def overwritten(data: bytearray) -> None:
    at = int(len(data) * 0.52)
    data[at : at + 64] = b"\xff" * 64


def zeroed(data: bytearray) -> None:
    at = int(len(data) * 0.52)
    data[at : at + 4_000] = bytes(4_000)


def dropped(data: bytearray) -> None:
    at = int(len(data) * 0.52) // 188 * 188
    del data[at : at + 2 * 188]


def damaged(folder: Path, name: str, damage: Callable[[bytearray], None]) -> Path:
    whole = fv.write(folder / f"whole.{name}", STYLES[name], count=COUNT)
    data = bytearray(whole.read_bytes())
    damage(data)
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, overwritten) for name in STYLES if name != "mjpeg.mov"),
        *((name, zeroed) for name in ("h264.mp4", "h264.ts", "mjpeg.mov")),
        *((name, dropped) for name in ("h264.mkv", "h264.ts", "mpeg2.ts")),
    ],
)
def test_one_damaged_spot_costs_one_spot(
    tmp_path: Path, name: str, damage: Callable[[bytearray], None]
) -> None:
    video = damaged(tmp_path, name, damage)
    report = chunk_video(video, tmp_path / "out", SETTINGS)
    made = fv.chunk_pictures(tmp_path / "out")
    assert len(made) == report.made >= 3
    # Matroska's clock of a millisecond makes rates vary, so a picture may stand a place beside its own.
    for start, (rate, numbers) in made.items():
        assert len(numbers) == pytest.approx(rate, abs=1)
        for place, number in enumerate(numbers):
            assert number == pytest.approx((start + place / rate) * 30, abs=1.01)
    spans, lost = report.losses.spans, report.losses.chunks
    assert sorted([*made, *lost]) == [0, 1, 2, 3, 4]
    assert lost
    assert all(2.0 < start <= end < 4.1 for start, end in spans)
    assert all(any(start < chunk + 1 and end >= chunk for start, end in spans) for chunk in lost)
    for start, end in spans:
        assert f"{start:.2f}-{end:.2f} s" in report.failed
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar is not None
    assert sidecar.losses.chunks == lost
    again = chunk_video(video, tmp_path / "out", SETTINGS)
    assert (again.made, again.kept, again.losses.chunks) == (0, report.made, lost)
    assert again.failed, "a loss stays a loss"


def test_a_damaged_beginning_and_a_damaged_end(tmp_path: Path) -> None:
    whole = fv.write(tmp_path / "whole.ts", count=COUNT)
    data = whole.read_bytes()
    packets = len(data) // 188
    start = bytearray(data)
    start[188 * 4 : 188 * 6] = b"\xff" * (188 * 2)
    (tmp_path / "start.ts").write_bytes(start)
    report = chunk_video(tmp_path / "start.ts", tmp_path / "a", SETTINGS)
    assert report.made >= 4
    assert report.losses.chunks in ((0,), ())
    end = bytearray(data)
    end[188 * (packets - 8) : 188 * (packets - 5)] = b"\xff" * (188 * 3)
    (tmp_path / "end.ts").write_bytes(end)
    report = chunk_video(tmp_path / "end.ts", tmp_path / "b", SETTINGS)
    assert report.losses.chunks == (4,)
    assert sorted(fv.chunk_pictures(tmp_path / "b")) == [0, 1, 2, 3]


AVI_STYLES = {
    "h264": Style(),
    "mpeg4": Style("mpeg4", options={"qscale": "2", "bf": "2"}),
    "mjpeg": STYLES["mjpeg.mov"],
}


def shortened(data: bytearray) -> None:
    at = int(len(data) * 0.4)
    del data[at : at + 2_500]


def header_overwritten(data: bytearray) -> None:
    at = data.find(b"00dc", len(data) // 2)
    data[at : at + 8] = bytes(8)


def without_index(data: bytearray) -> None:
    del data[data.rfind(b"idx1") :]
    zeroed(data)


@pytest.mark.parametrize("style", AVI_STYLES)
@pytest.mark.parametrize("damage", [zeroed, shortened, header_overwritten, without_index])
def test_an_avi_that_lost_packets(tmp_path: Path, style: str, damage: Callable[[bytearray], None]) -> None:
    """It states no times: what follows a lost packet would be too early."""
    whole = fv.write(tmp_path / "whole.avi", AVI_STYLES[style], count=COUNT)
    data = bytearray(whole.read_bytes())
    damage(data)
    video = tmp_path / "v.avi"
    video.write_bytes(data)
    report = chunk_video(video, tmp_path / "out", SETTINGS)
    made = fv.chunk_pictures(tmp_path / "out")
    for start, (rate, numbers) in made.items():
        assert rate == 30
        assert numbers == list(range(30 * start, 30 * start + 30))
    assert made and report.losses.spans and report.losses.chunks
    assert all(first < second for first, second in report.losses.spans)
    if damage is without_index:
        assert report.losses.spans[-1][1] > 3.5, "what follows the damage is of unknown time"
    else:
        assert sorted([*made, *report.losses.chunks]) == [0, 1, 2, 3, 4]
        assert 4 in made
        with pytest.raises(DecodeError, match=r"lacks \d+ of its 150 packets"):
            probe_chunk(video)


def test_a_truncated_avi_names_what_its_header_promised(tmp_path: Path) -> None:
    whole = fv.write(tmp_path / "whole.avi", AVI_STYLES["h264"], count=COUNT).read_bytes()
    (tmp_path / "v.avi").write_bytes(whole[: len(whole) // 2])
    report = chunk_video(tmp_path / "v.avi", tmp_path / "out", SETTINGS)
    made = fv.chunk_pictures(tmp_path / "out")
    assert made and sorted([*made, *report.losses.chunks]) == [0, 1, 2, 3, 4]
    assert report.losses.spans[-1][1] == 5
    assert "before the expected 5.0 s" in report.failed


def test_an_avi_without_an_index_that_lost_nothing(tmp_path: Path) -> None:
    for style in AVI_STYLES:
        video = fv.write(tmp_path / f"{style}.avi", AVI_STYLES[style], count=COUNT, sound_seconds=2)
        data = video.read_bytes()
        video.write_bytes(data[: data.rfind(b"idx1")])
        report = chunk_video(video, tmp_path / style, SETTINGS)
        assert (report.failed, report.made) == ("", 5)
        assert fv.misplaced(video, tmp_path / style) == []


def test_captions_in_a_lost_part_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(building, "clip_tokenizer", lambda: lambda text: (1, len(text), 2))
    video = damaged(tmp_path, "h264.mkv", overwritten)
    chunks = tmp_path / "chunks"
    command = ["chunk", str(video), "--output", str(chunks), "--chunk-seconds", "1", "--short-side", "96"]
    assert main(command) == 1
    error = capsys.readouterr().err
    sidecar = json.loads((chunks / "h264.mkv" / "chunks.json").read_text())
    (lost,) = sidecar["lost_chunks"]
    assert "damaged at" in error
    assert f"{sidecar['lost_seconds'][0][0]:.2f}-" in error
    rows = [(lost + 0.2, lost + 0.4), (lost - 0.5, lost + 0.1), (0.1, 0.9), (lost + 1, lost + 1.5), (4.0, "")]
    lines = ["video,start,end,text", *(f"h264,{start},{end},x" for start, end in rows), "h264,,,all of it"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    build = ["manifest", "captions", "--chunks", str(chunks), "--annotations", str(tmp_path / "rows.csv")]
    assert main([*build, "--output", str(tmp_path / "m"), "--skip-bad-rows"]) == 0
    assert "3 rows left out" in (out := capsys.readouterr().out)
    assert "3 in a lost part" in out
    rejected = [json.loads(line) for line in (tmp_path / "m" / "rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejected] == [2, 3, 7]
    assert all("damaged at" in row["reason"] for row in rejected)


def test_sound_videos_lose_nothing(tmp_path: Path) -> None:
    for name in STYLES:
        video = fv.write(tmp_path / name, STYLES[name], count=40)
        report = chunk_video(video, tmp_path / "out" / name, SETTINGS)
        assert (report.failed, report.losses.spans, report.made) == ("", (), 2), name
        assert mv.frame_numbers(tmp_path / "out" / name / "1.mp4")[-1] == 39


# --- damage that no checksum notices, since the index is built over it


def kinds(path: Path, *, deep: bool) -> set[str]:
    return {finding.kind for finding in inspect_file(Target(str(path), deep)).findings}


def test_a_header_that_orders_pictures_otherwise_than_they_say(tmp_path: Path) -> None:
    """Decoders by index and decoders from the beginning would show different pictures."""
    style = Style(options=mv.X264_FAST | {"x264-params": "bframes=3:b-adapt=0:scenecut=0"})
    video = fv.write(tmp_path / "v.mp4", style, count=30)
    assert not kinds(video, deep=True) & {"wrong-order", "undecodable", "wrong-count"}
    data = bytearray(video.read_bytes())
    at, frame = data.rfind(b"ctts") + 12, 512  # ticks
    entries = np.frombuffer(bytes(data[at : at + 8 * 20]), ">u4").reshape(-1, 2).astype(int)
    # Two pictures of one frame each, decoded one after the other, change their places.
    i = next(i for i in range(2, 18) if (entries[i : i + 2, 0] == 1).all() and entries[i, 1] >= frame)
    (_, first), (_, second) = entries[i : i + 2]
    assert first - second != frame
    swapped = np.array([1, second + frame, 1, first - frame], ">u4")
    data[at + 8 * i : at + 8 * i + 16] = swapped.tobytes()
    video.write_bytes(data)
    assert "undecodable" in kinds(video, deep=False), "an index would make the damage permanent"


@pytest.mark.parametrize(("name", "box"), [("a.mp4", b"avc1"), ("b.mov", b"jpeg")])
def test_a_header_that_says_another_picture_size(tmp_path: Path, name: str, box: bytes) -> None:
    style = Style() if box == b"avc1" else STYLES["mjpeg.mov"]
    video = fv.write(tmp_path / name, style, count=10)
    data = bytearray(video.read_bytes())
    at = data.rfind(box) + 4 + 24
    assert int.from_bytes(data[at : at + 2], "big") == fv.SIZE[0]
    data[at : at + 2] = (64).to_bytes(2, "big")
    video.write_bytes(data)
    found = fv.disagreements(video) if not kinds(video, deep=False) & {"undecodable"} else []
    assert found == [], "refused, or the same for all decoders"


def test_damage_that_decoders_conceal_in_different_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = fv.write(tmp_path / "v.mp4", count=40)
    other = fv.chunk_of(probe_chunk(fv.write(tmp_path / "other.mp4", count=40, first=50))).ref
    assert not {kind for kind in kinds(video, deep=True) if KINDS[kind].severity == "error"}
    read = reader_comparison.read_spanned

    def with_one_other(part: ClipPart) -> list[av.VideoFrame]:
        return [*read(part)[:-1], *read(ClipPart(other, part.frame_ids))[-1:]]

    monkeypatch.setattr(reader_comparison, "read_spanned", with_one_other)
    (finding,) = [f for f in inspect_file(Target(str(video), True)).findings if f.is_error]
    assert (finding.kind, finding.frame_id) == ("decoders-differ", 4 + 12)
    assert "decoders-differ" not in kinds(video, deep=False)
