"""Recordings joined byte by byte: all of them are cut, one after the other."""

from pathlib import Path

import field_videos as fv
import make_videos as mv
import pytest
from field_videos import Style
from test_field_timing import HEVC, MJPEG, MPEG2, MPEG4, cut

from avion_dali.data.probe import probe_chunk
from avion_dali.data.scanning import probe_files
from avion_dali.inspection.chunk_file import inspect_file
from avion_dali.inspection.findings import Target


@pytest.mark.parametrize(
    ("style", "ending"),
    [
        (Style(), "ts"),
        (HEVC, "ts"),
        (MPEG2, "ts"),
        (Style("mpeg2video", options={"qscale": "2"}, container="mpeg"), "mpg"),
        (Style(container="mpeg"), "mpg"),
        (Style(container="h264"), "h264"),
        (Style(), "mkv"),
    ],
)
def test_recordings_joined_byte_by_byte(tmp_path: Path, style: Style, ending: str) -> None:
    first = fv.write(tmp_path / f"a.{ending}", style, count=40)
    second = fv.write(tmp_path / f"b.{ending}", style, count=35, first=100)
    video = tmp_path / f"v.{ending}"
    video.write_bytes(first.read_bytes() + second.read_bytes())
    report, folder = cut(video)
    assert report.failed == ""
    numbers = [number for _, shown in fv.chunk_pictures(folder).values() for number in shown]
    assert numbers == [*range(40), *range(100, 135)]
    facts = probe_chunk(video)
    assert facts.num_frames == 75
    assert fv.disagreements(video) == []


FRAGMENTS = Style(muxing={"movflags": "frag_keyframe+empty_moov"})


@pytest.mark.parametrize(
    ("style", "ending"),
    [
        (Style(), "mp4"),
        (Style(), "mov"),
        (FRAGMENTS, "mp4"),
        (Style(), "avi"),
        (MPEG4, "avi"),
        (MJPEG, "avi"),
        (Style(), "flv"),
        (Style(), "3gp"),
    ],
)
def test_joined_files_of_which_readers_read_the_first_recording(
    tmp_path: Path, style: Style, ending: str
) -> None:
    """FFmpeg and players stop at the end of the first one; all of them are kept."""
    parts = [fv.write(tmp_path / f"{first}.{ending}", style, count=30, first=first) for first in (0, 100, 200)]
    video = tmp_path / f"v.{ending}"
    video.write_bytes(b"".join(part.read_bytes() for part in parts))
    report, folder = cut(video)
    assert report.failed == ""
    assert "contains 3 recordings" in report.notes[-1]
    numbers = [number for _, shown in fv.chunk_pictures(folder).values() for number in shown]
    assert numbers == [*range(30), *range(100, 130), *range(200, 230)]
    again, _ = cut(video)
    assert (again.made, again.kept, again.failed) == (0, 3, "")
    _, (unusable,) = probe_files([("v", 0.0, video)], jobs=1)
    assert "contains 3 recordings and only the first" in unusable.reason
    found = {finding.kind for finding in inspect_file(Target(str(video), False)).findings}
    assert found & {"joined", "undecodable"}


def test_joined_files_of_other_rates_and_sizes(tmp_path: Path) -> None:
    first = fv.write(tmp_path / "a.mp4", rate=25, count=50)
    second = fv.write(tmp_path / "b.mp4", Style(size=(128, 64)), rate=30, count=60, first=100)
    video = tmp_path / "v.mp4"
    video.write_bytes(first.read_bytes() + second.read_bytes())
    report, folder = cut(video)
    assert (report.made, report.failed) == (4, "")
    assert "changes size" in report.notes[-1]
    for start, expected in ((0, 0), (1, 25)):
        numbers = mv.frame_numbers(folder / f"{start}.mp4")
        assert numbers[0] == expected and set(numbers) == set(range(expected, expected + 25))
    pictures = mv.decode_all(folder / "3.mp4")
    assert [mv.read_frame_number(picture[16:80]) for picture in pictures] == list(range(130, 160))


def test_a_joined_recording_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    first = fv.write(tmp_path / "a.mp4", count=30)
    second = bytearray(fv.write(tmp_path / "b.mp4", count=30, first=100).read_bytes())
    at = second.find(b"moov")
    second[at : at + 4] = b"vooM"
    video = tmp_path / "v.mp4"
    video.write_bytes(first.read_bytes() + second)
    for made in (1, 0):
        report, folder = cut(video)
        assert report.made == made
        assert f"another recording from byte {first.stat().st_size} on, which cannot be read" in report.failed
    assert mv.frame_numbers(folder / "0.mp4") == list(range(30))


def test_a_size_that_changes_is_fitted_into_the_first(tmp_path: Path) -> None:
    wide = Style(size=(128, 64), container="mpegts")
    first, second = (
        fv.write(tmp_path / "a.ts", count=30),
        fv.write(tmp_path / "b.ts", wide, count=30, first=100),
    )
    video = tmp_path / "v.ts"
    video.write_bytes(first.read_bytes() + second.read_bytes())
    report, folder = cut(video)
    assert (report.made, report.failed) == (2, "")
    assert "changes size" in report.notes[-1]
    pictures = mv.decode_all(folder / "1.mp4")
    assert pictures[0].shape == (96, 128, 3)
    assert [mv.read_frame_number(picture[16:80]) for picture in pictures] == list(range(100, 130))
    assert pictures[0][:12].max() < 40, "a black bar"
