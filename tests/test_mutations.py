"""The damage that reading is tried with: the same for a seed, of the kind it says, and never none."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import mutations


@pytest.fixture(scope="module")
def files(gop_videos: dict[str, Path]) -> dict[str, bytes]:
    return {style: gop_videos[style].read_bytes() for style in ("balanced", "hevc", "vp9", "mkv")}


@pytest.mark.parametrize("kind", mutations.KINDS)
def test_damage_is_repeatable_and_never_none(files: dict[str, bytes], kind: str) -> None:
    for data in files.values():
        copies = [mutations.mutated(data, kind, seed) for seed in range(20)]
        assert copies == [mutations.mutated(data, kind, seed) for seed in range(20)]
        assert data not in copies
        assert len(set(copies)) >= 19
        same_size = [len(copy) == len(data) for copy in copies]
        assert all(same_size) if kind in mutations.SAME_SIZE else not any(same_size)


def changed_bytes(data: bytes, copy: bytes) -> list[int]:
    return np.flatnonzero(np.frombuffer(data, np.uint8) != np.frombuffer(copy, np.uint8)).tolist()


def test_flips_change_single_bits_anywhere(files: dict[str, bytes]) -> None:
    data, places = files["balanced"], []
    for seed in range(200):
        copy = mutations.mutated(data, "flipped bits", seed)
        changed = changed_bytes(data, copy)
        assert 1 <= len(changed) <= 8
        places += changed
    assert min(places) < len(data) // 20
    assert max(places) > 19 * len(data) // 20


def test_boxes_of_mp4_are_found(files: dict[str, bytes]) -> None:
    data = files["balanced"]
    kinds = [data[piece.start + 4 : piece.content] for piece in mutations.pieces(data)]
    for kind in (
        b"ftyp",
        b"mdat",
        b"moov",
        b"stsd",
        b"avc1",
        b"avcC",
        b"stts",
        b"ctts",
        b"stsc",
        b"stsz",
        b"stco",
    ):
        assert kinds.count(kind) == 1
    assert b"hvcC" in [files["hevc"][p.start + 4 : p.content] for p in mutations.pieces(files["hevc"])]


def test_elements_of_matroska_are_found(files: dict[str, bytes]) -> None:
    for style in ("vp9", "mkv"):
        found = mutations.pieces(files[style])
        names = {files[style][p.start : p.start + 4] for p in found}
        assert bytes.fromhex("1A45DFA3") in names  # EBML
        assert bytes.fromhex("1F43B675") in names  # Cluster
        assert sum(files[style][p.start] == 0xA3 for p in found) >= 80  # SimpleBlock, one a frame
        assert all(p.start < p.content <= p.end <= len(files[style]) for p in found)


@pytest.mark.parametrize("style", ["balanced", "vp9"])
def test_edits_of_boxes_spare_the_pictures(files: dict[str, bytes], style: str) -> None:
    data = files[style]
    headers = {at for p in mutations.pieces(data) for at in range(p.start, p.content)}
    numbers = {at for p in mutations.pieces(data) for at in range(p.content, min(p.end, p.content + 64))}
    allowed = headers | numbers
    assert len(allowed) < len(data) // 2
    for seed in range(100):
        changed = changed_bytes(data, mutations.mutated(data, "box edits", seed))
        assert set(changed) <= allowed
        assert changed[-1] - changed[0] < 4
