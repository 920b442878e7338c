"""The files of a manifest: a new build takes an old one's place in one step, and damage is one error."""

import itertools
import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from chunk_folders import stored_file
from test_manifest import CHUNKS, CLASSES, SAMPLES, write, write_every_file

from avion_dali.contracts import UserError
from avion_dali.data.classes import CaptionTable
from avion_dali.data.manifest import IndexWriter, Manifest, write_manifest


@pytest.mark.parametrize("is_old_format", [False, True])
def test_wherever_a_build_ends_there_is_the_old_manifest_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old_format: bool
) -> None:
    real = {name: getattr(os, name) for name in ("replace", "unlink", "mkdir", "fsync", "rmdir")}
    steps, found = itertools.count(), set()
    while True:
        folder, stop_at, calls = tmp_path / f"m{next(steps)}", len(list(tmp_path.iterdir())), itertools.count()
        write(folder)
        if is_old_format:
            as_format_3(folder)

        def interrupted(name: str, *arguments: object, stop_at=stop_at, calls=calls, **more: object) -> object:
            if next(calls) >= stop_at:  # as after SIGKILL: nothing is tidied up
                raise KeyboardInterrupt
            return real[name](*arguments, **more)

        for name in real:
            monkeypatch.setattr(os, name, partial(interrupted, name))
        with suppress(KeyboardInterrupt), IndexWriter(folder) as index:
            index.add(b"new")
            write_manifest(folder, chunk_root="/chunks", chunks=CHUNKS, samples=SAMPLES[:1], index=index)
        for name, function in real.items():
            monkeypatch.setattr(os, name, function)
        rows = list(Manifest(folder).samples())
        assert rows in (SAMPLES, SAMPLES[:1])
        found.add(len(rows))
        write(folder, samples=SAMPLES[:2])  # the next build clears away what is left
        assert list(Manifest(folder).samples()) == SAMPLES[:2]
        assert len([path for path in folder.iterdir() if path.is_dir()]) == 1
        if next(calls) < stop_at:
            break
    assert found == {1, len(SAMPLES)}


def as_format_3(folder: Path) -> None:
    """Turn a manifest into one of format 3: its files beside `manifest.json`, without checksums."""
    info = json.loads((folder / "manifest.json").read_text())
    for file in info.pop("files").values():
        (folder / file["path"]).rename(folder / Path(file["path"]).name)
    for build in folder.glob("build-*"):
        build.rmdir()
    (folder / "manifest.json").write_text(json.dumps(info | {"format_version": 3}))


def test_manifests_of_format_3_are_read(tmp_path: Path) -> None:
    write_every_file(tmp_path, grade=0.5, index_record=b"index")
    as_format_3(tmp_path)
    opened = Manifest(tmp_path)
    assert list(opened.samples()) == SAMPLES and opened.classes == CLASSES
    assert opened.captions is not None and opened.captions.texts == ("cut",)
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "build-1", "packets.bin"}


def test_every_flipped_byte_of_a_table_is_one_error(tmp_path: Path) -> None:
    captions = CaptionTable(("cut",), ((1,),), np.full((len(SAMPLES), 1), 0.5))
    write_manifest(
        tmp_path, chunk_root="/chunks", chunks=CHUNKS, samples=SAMPLES, captions=captions, classes=CLASSES
    )

    def read_all() -> None:
        opened = Manifest(tmp_path)
        assert list(opened.samples()) == SAMPLES and opened.classes == CLASSES and opened.captions
        assert [opened.chunk(row).ref for row in range(opened.num_chunks)] == [chunk.ref for chunk in CHUNKS]

    read_all()
    for name in ("chunks.arrow", "samples.arrow", "classes.json", "captions.arrow", "relevancy.npy"):
        path = stored_file(tmp_path, name)
        whole = path.read_bytes()
        for at in range(0, len(whole), max(len(whole) // 25, 1)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            with pytest.raises(UserError, match=rf"{name} .*build it again"):
                read_all()
        path.write_bytes(whole)


@pytest.mark.parametrize("files", [[], "x", {"a": 3}, {"a": {"path": "b", "checksums": [[1]]}}, {"a": {}}])
def test_a_damaged_list_of_files_is_a_user_error(tmp_path: Path, files: object) -> None:
    path = write(tmp_path) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))
    with pytest.raises(UserError, match=r"manifest\.json.*again"):
        Manifest(tmp_path)


def test_what_a_killed_build_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "build-3").mkdir()
    (tmp_path / "build-3" / "captions.arrow").write_bytes(b"stale")
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"build-1", "manifest.json"}
    assert {path.name for path in (tmp_path / "build-1").iterdir()} == {
        "chunks.arrow",
        "samples.arrow",
        "classes.json",
    }


@pytest.mark.parametrize("name", ["chunk_root", "num_chunks", "num_samples", "index_bytes", "fingerprint"])
@pytest.mark.parametrize("value", [None, [], {}, 1.5])
def test_facts_of_other_types_are_a_user_error(tmp_path: Path, name: str, value: object) -> None:
    path = write(tmp_path) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=rf"manifest\.json has no {name}"):
        Manifest(tmp_path)


def test_a_deeply_nested_manifest_json_is_a_user_error(tmp_path: Path) -> None:
    (write(tmp_path) / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON"):
        Manifest(tmp_path)
