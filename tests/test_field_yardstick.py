"""The decoder `reference`, which the others are compared with, against FFmpeg's own command line."""

import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import field_videos as fv
import make_videos as mv
import numpy as np
import pytest
from field_videos import Style
from test_field_decoders import STYLES

from avion_dali.data.probe import probe_chunk

FFMPEG = shutil.which("ffmpeg")
pytestmark = pytest.mark.skipif(FFMPEG is None, reason="needs the ffmpeg command")


def version() -> tuple[int, ...]:
    """The version of the command; that of a development build counts as the newest."""
    if FFMPEG is None:
        return (0,)
    said = subprocess.run([FFMPEG, "-version"], stdout=subprocess.PIPE, check=True).stdout.decode()
    found = re.match(r"ffmpeg version n?(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (99,)


TAKES_TIME_BASE_OF_DEMUXER = version() >= (6, 1)
VP9 = Style("libvpx-vp9", options=mv.VP9_FAST | {"g": "10"})


def ffmpeg(video: Path, *options: str) -> bytes:
    """What FFmpeg writes of all pictures of a video."""
    command = [
        str(FFMPEG),
        "-v",
        "error",
        "-copyts",
        "-i",
        str(video),
        "-map",
        "0:v:0",
        "-fps_mode",
        "passthrough",
    ]
    return subprocess.run([*command, *options, "-"], stdout=subprocess.PIPE, check=True).stdout


def numbers_by_ffmpeg(video: Path) -> list[int]:
    width, height = fv.SIZE
    raw = ffmpeg(video, "-f", "rawvideo", "-pix_fmt", "rgb24")
    return [
        mv.read_frame_number(picture) for picture in np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
    ]


def seconds_by_ffmpeg(video: Path) -> list[float]:
    """Times of the pictures after the container's start."""
    time_base = "demux" if TAKES_TIME_BASE_OF_DEMUXER else "-1"
    report = ffmpeg(video, "-f", "framecrc", "-enc_time_base", time_base)
    lines = report.decode().splitlines()
    with av.open(str(video)) as container:
        start = (container.start_time or 0) / av.time_base
    tick = next(Fraction(line.split(":")[1].strip()) for line in lines if line.startswith("#tb"))
    return [float(int(line.split(",")[2]) * tick) - start for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("name", STYLES)
def test_every_picture_in_its_order(tmp_path: Path, name: str) -> None:
    video = fv.write(tmp_path / name, STYLES[name], count=25)
    facts = probe_chunk(video)
    found = fv.frame_numbers(fv.chunk_of(facts).ref, list(range(facts.num_frames)), "reference")
    assert found == numbers_by_ffmpeg(video)


@pytest.mark.parametrize("delay", [0, 2, 17])
@pytest.mark.parametrize(
    ("style", "ending"), [(Style(), "mp4"), (Style(), "mkv"), (Style(), "ts"), (VP9, "mkv")]
)
def test_every_picture_at_its_time(tmp_path: Path, style: Style, ending: str, delay: int) -> None:
    if ending == "ts" and delay and not TAKES_TIME_BASE_OF_DEMUXER:
        pytest.skip("FFmpeg before 6.1 shifts the times of MPEG-TS")
    video = fv.write(tmp_path / f"v.{ending}", style, delay=delay, sound_seconds=1, count=25)
    facts = probe_chunk(video)
    times = facts.clock_times()
    found = np.arange(facts.num_frames) / 30 if times is None else times
    # Less than half a frame of delay comes from the priming of the sound.
    assert found == pytest.approx(seconds_by_ffmpeg(video), abs=2e-3 if delay else 0.5 / 30)


@pytest.mark.parametrize("hidden", [4, 13])
def test_edit_lists(tmp_path: Path, hidden: int) -> None:
    video = mv.edit_list_video(tmp_path / "v.mp4", frames=40, hidden=hidden)
    facts = probe_chunk(video)
    found = fv.frame_numbers(fv.chunk_of(facts).ref, list(range(facts.num_frames)), "reference")
    assert found == numbers_by_ffmpeg(video) == list(range(hidden, 40))


def test_varying_rates(tmp_path: Path) -> None:
    ticks = [0, 40, 73, 500, 533, 566, 1500]
    for ending in ("mp4", "mkv"):
        path = tmp_path / f"v.{ending}"
        video = fv.write(path, ticks=ticks, time_base=Fraction(1, 1000), count=len(ticks))
        assert probe_chunk(video).clock_times() == pytest.approx(seconds_by_ffmpeg(video), abs=1e-3)
