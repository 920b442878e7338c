"""Containers name no other files and claim no more than they hold, whatever a file is called."""

import os
import resource
import struct
import time
from pathlib import Path

import av
import make_videos
import pytest

from avion_dali.contracts import DecodeError
from avion_dali.data import container_limits
from avion_dali.data.container_limits import ExcessiveClaimError, require_modest_header
from avion_dali.data.probe import open_video, probe_chunk


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos.write_video(tmp_path_factory.mktemp("v") / "plain.mp4", frames=30)


@pytest.fixture(scope="module")
def fragmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    path = tmp_path_factory.mktemp("v") / "fragmented.mp4"
    return make_videos.write_video(path, frames=60, gop=10, container_options=options)


def patched(path: Path, kind: bytes, at: int, numbers: bytes) -> bytes:
    """The file with other numbers at a place in the body of its first box of a kind."""
    data = path.read_bytes()
    start = data.index(kind) + 4 + at
    return data[:start] + numbers + data[start + len(numbers) :]


def playlists(target: Path) -> dict[str, str]:
    return {
        "concat": f"ffconcat version 1.0\nfile '{target.name}'\n",
        "concat-itself": "ffconcat version 1.0\nfile 'list.mp4'\n",
        "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.0,\n"
        f"{target.name}\n#EXT-X-ENDLIST\n",
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        f'mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period>'
        f'<AdaptationSet><Representation id="0" mimeType="video/mp4" bandwidth="1"><BaseURL>{target.name}'
        "</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
    }


@pytest.mark.parametrize("kind", playlists(Path("x")))
def test_texts_that_name_other_files_are_no_video(tmp_path: Path, plain: Path, kind: str) -> None:
    target = tmp_path / "target.mp4"
    os.link(plain, target)
    path = tmp_path / "list.mp4"
    path.write_text(playlists(target)[kind])
    with pytest.raises(DecodeError) as caught:
        probe_chunk(path)
    assert caught.value.kind == "corrupt"


def test_patterns_and_addresses_are_no_files(tmp_path: Path, plain: Path) -> None:
    for name in (
        "img%03d.mp4",
        f"concat:{plain}",
        f"subfile,,start,0,end,0,,:{plain}",
        "http://127.0.0.1:9/v.mp4",
    ):
        with pytest.raises(DecodeError), open_video(name):
            pass


@pytest.mark.parametrize(
    ("kind", "at", "numbers"),
    [
        (b"stsz", 4, struct.pack(">II", 1, 20_000_000)),
        (b"stsz", 4, struct.pack(">II", 5_000, 900)),
        (b"stsz", 4, struct.pack(">II", 0xFFFFFFFF, 0xFFFFFFFF)),
        (b"mvhd", -4, b"cmov"),
    ],
)
def test_headers_that_claim_too_much_are_refused_at_once(
    tmp_path: Path, plain: Path, kind: bytes, at: int, numbers: bytes
) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(patched(plain, kind, at, numbers))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(DecodeError, match="claims more samples|compressed header"):
        probe_chunk(path)
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("flags", [0x000001, 0x000005, 0x000201])
def test_fragments_that_claim_too_much_are_refused(tmp_path: Path, fragmented: Path, flags: int) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(patched(fragmented, b"trun", 0, struct.pack(">II", flags, 50_000_000)))
    with pytest.raises(DecodeError, match="claims more samples"):
        probe_chunk(path)


def test_sound_files_pass(plain: Path, fragmented: Path, tmp_path: Path, gop_videos: dict[str, Path]) -> None:
    sound = make_videos.write_video(tmp_path / "sound.mp4", frames=30, audio_seconds=1.0)
    for path in (plain, fragmented, sound, *gop_videos.values()):
        with path.open("rb") as file:
            require_modest_header(file.fileno())
    assert probe_chunk(fragmented).num_frames == 60


def test_the_walk_over_boxes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_limits, "_MAX_BOXES", 100)
    path = tmp_path / "v.mp4"
    path.write_bytes(struct.pack(">I4s", 8, b"free") * 101)
    with path.open("rb") as file, pytest.raises(ExcessiveClaimError, match="boxes"):
        require_modest_header(file.fileno())
    nested = b""
    for _ in range(50):
        nested = struct.pack(">I4s", len(nested) + 8, b"moov") + nested
    path.write_bytes(nested)
    with path.open("rb") as file:
        require_modest_header(file.fileno())


def test_allowed_names_are_ffmpegs() -> None:
    known = {name for names in av.formats_available for name in names.split(",")}
    assert set(container_limits.ALLOWED_DEMUXERS) <= known
