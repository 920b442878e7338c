"""A repaired manifest holds exactly the clips that touch no bad chunk, and what was there can be had back."""

import json
import os
import shutil
import subprocess
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from chunk_folders import chunk_row, chunk_rows, contents, sample_row, stored_file, write_random_manifest

from avion_dali.contracts import UserError
from avion_dali.data import manifest as manifest_module
from avion_dali.data.classes import CaptionTable
from avion_dali.data.manifest import Manifest, Sample, write_manifest
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.data.relevancy import open_captions
from avion_dali.inspection import repair as module
from avion_dali.inspection.repair import BAD_CHUNKS_FILE, RepairReport, repair_manifest

COUNT = 300
BAD = {"/chunks/a/15.mp4": ["truncated"], "/chunks/c/0.mp4": ["undecodable"]}
BACKUP = "manifest.before-repair.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_manifest(tmp_path / "m", num_samples=COUNT)


def rows(folder: Path) -> list[Sample]:
    opened = Manifest(folder)
    return [opened.sample(i) for i in range(opened.num_samples)]


def good_rows(folder: Path, bad: object) -> list[Sample]:
    """Rows of a manifest that touch no bad chunk, one by one."""
    opened = Manifest(folder)
    paths = [opened.chunk(i).ref.path for i in range(opened.num_chunks)]
    return [s for s in rows(folder) if not set(paths[s.first_chunk : s.first_chunk + s.num_chunks]) & set(bad)]


def test_only_the_clips_of_bad_chunks_go(folder: Path) -> None:
    expected, chunks = good_rows(folder, BAD), stored_file(folder, "chunks.arrow").read_bytes()
    before = Manifest(folder)
    done = repair_manifest(folder, BAD)
    assert 0 < len(expected) < COUNT - 20
    assert rows(folder) == expected
    assert (done.num_samples, done.removed) == (len(expected), COUNT - len(expected))
    after = Manifest(folder)
    assert after.info == before.info | {
        "num_samples": len(expected),
        "removed_samples": COUNT - len(expected),
        "fingerprint": after.fingerprint,
        "files": before.info["files"] | {"samples.arrow": after.info["files"]["samples.arrow"]},
    }
    assert stored_file(folder, "chunks.arrow").read_bytes() == chunks
    assert after.fingerprint != before.fingerprint
    assert after.fingerprint == zlib.crc32(chunks + stored_file(folder, "samples.arrow").read_bytes())
    lines = [json.loads(line) for line in (folder / BAD_CHUNKS_FILE).read_text().splitlines()]
    assert lines == [
        {"row": 1, "path": "/chunks/a/15.mp4", "kinds": ["truncated"]},
        {"row": 6, "path": "/chunks/c/0.mp4", "kinds": ["undecodable"]},
    ]


def test_no_plan_touches_a_bad_chunk_any_more(folder: Path) -> None:
    rules = ClipRules(num_frames=4, frame_size=64, training=True)

    def planned_paths() -> set[str]:
        planner = Planner(Manifest(folder), rules, seed=0)
        plans = [planner.plan(i, epoch) for i in range(planner.manifest.num_samples) for epoch in range(3)]
        return {part.chunk.path for plan in plans for part in plan.parts}

    assert set(BAD) <= planned_paths()
    repair_manifest(folder, BAD)
    assert not set(BAD) & planned_paths()
    assert len(planned_paths()) == 10


@pytest.mark.parametrize("batch", [1, 7, 50, COUNT - 1, COUNT])
def test_rows_are_found_by_division_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    for patched in (manifest_module, module):
        monkeypatch.setattr(patched, "ROWS_PER_BATCH", batch)
    folder = write_random_manifest(tmp_path / "m", num_samples=COUNT)
    expected = good_rows(folder, BAD)
    repair_manifest(folder, BAD)
    assert rows(folder) == expected
    with pa.ipc.open_file(str(stored_file(folder, "samples.arrow"))) as reader:
        sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    assert sizes[:-1] == [batch] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= batch


def test_the_undo_command_brings_back_every_byte(tmp_path: Path) -> None:
    folder = write_random_manifest(tmp_path / "with space", num_samples=COUNT)
    before = contents(folder)
    done = repair_manifest(folder, BAD)
    subprocess.run(done.undo, shell=True, check=True)
    assert contents(folder) == before


def test_a_later_repair_gives_restored_chunks_their_clips_back(folder: Path) -> None:
    before = contents(folder)
    other = {"/chunks/b/30.mp4": ["missing"]}
    expected = good_rows(folder, other)
    repair_manifest(folder, BAD)
    done = repair_manifest(folder, other)
    assert rows(folder) == expected
    assert done.removed == COUNT - len(expected) == Manifest(folder).info["removed_samples"]
    assert repair_manifest(folder, {}) == RepairReport(COUNT, 0, "")
    assert contents(folder) == before


def test_a_moved_chunk_folder_stays_moved(folder: Path) -> None:
    repair_manifest(folder, BAD)
    info = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(info | {"chunk_root": "/moved"}))
    with pytest.raises(UserError, match="is not a chunk of"):
        repair_manifest(folder, BAD)
    repair_manifest(folder, {})
    assert Manifest(folder).chunk_root == "/moved"


def test_a_manifest_built_anew_forgets_the_repair(folder: Path) -> None:
    repair_manifest(folder, BAD)
    write_random_manifest(folder, num_samples=40)
    expected = good_rows(folder, BAD)
    done = repair_manifest(folder, BAD)
    assert rows(folder) == expected
    assert done.removed == 40 - len(expected)


def test_without_a_backup_the_rows_that_are_left_count(folder: Path) -> None:
    expected = good_rows(folder, {**BAD, "/chunks/b/30.mp4": ()})
    repair_manifest(folder, BAD)
    (folder / BACKUP).unlink()
    done = repair_manifest(folder, {"/chunks/b/30.mp4": ["missing"]})
    assert rows(folder) == expected
    assert (done.num_samples, done.removed) == (len(expected), COUNT - len(expected))


@pytest.mark.parametrize("bad", [{}, {"/chunks/z/0.mp4": ["missing"]}])
def test_where_no_clip_is_touched_nothing_changes(tmp_path: Path, bad: dict[str, list[str]]) -> None:
    chunks = [chunk_row("y", 0), chunk_row("z", 0)]
    write_manifest(tmp_path, chunk_root="/chunks", chunks=chunks, samples=[sample_row(0, 1)])
    before = contents(tmp_path)
    assert repair_manifest(tmp_path, bad) == RepairReport(1, 0, "")
    assert contents(tmp_path) == before


def test_a_manifest_is_never_emptied(folder: Path) -> None:
    before = contents(folder)
    opened = Manifest(folder)
    everything = {opened.chunk(i).ref.path: ["missing"] for i in range(opened.num_chunks)}
    with pytest.raises(UserError, match=r"no clip is left.*/chunks"):
        repair_manifest(folder, everything)
    assert contents(folder) == before


def test_paths_of_other_manifests_are_refused(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(UserError, match=r"/elsewhere/0\.mp4 is not a chunk of"):
        repair_manifest(folder, {**BAD, "/elsewhere/0.mp4": ["missing"]})
    assert contents(folder) == before


def test_a_running_training_keeps_its_rows(folder: Path) -> None:
    opened, expected = Manifest(folder), rows(folder)
    repair_manifest(folder, BAD)
    assert [opened.sample(i) for i in range(COUNT)] == expected


def test_an_interruption_leaves_the_old_manifest_or_the_new_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(folder)
    shutil.copytree(folder, tmp_path / "new")
    repair_manifest(tmp_path / "new", BAD)
    after, replace, states = rows(tmp_path / "new"), os.replace, []
    for stop_at in range(6):
        copy, calls = tmp_path / f"copy{stop_at}", iter(range(stop_at))
        shutil.copytree(folder, copy)

        def interrupted(a: Path, b: Path, calls: object = calls) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            replace(a, b)

        monkeypatch.setattr(os, "replace", interrupted)
        with suppress(KeyboardInterrupt):
            repair_manifest(copy, BAD)
        monkeypatch.setattr(os, "replace", replace)
        found = rows(copy)
        assert found in (before, after)
        states.append("old" if found == before else "new")
        repair_manifest(copy, {})
        assert rows(copy) == before
    assert set(states) == {"old", "new"} and states == sorted(states, reverse=True)


def test_a_repair_of_format_3_is_undone(folder: Path) -> None:
    """There, a repair kept the old sample table beside the new one."""
    expected, before = rows(folder), json.loads((folder / "manifest.json").read_text())
    samples = stored_file(folder, "samples.arrow").read_bytes()
    repair_manifest(folder, BAD)
    now = json.loads((folder / "manifest.json").read_text())
    for name in ("chunks.arrow", "samples.arrow"):
        (folder / name).write_bytes(stored_file(folder, name).read_bytes())
    (folder / "samples.before-repair.arrow").write_bytes(samples)
    for path, info in ((folder / "manifest.json", now), (folder / BACKUP, before)):
        path.write_text(json.dumps({**info, "files": {}, "format_version": 3}))
    assert len(rows(folder)) < len(expected)
    repair_manifest(folder, {})
    assert rows(folder) == expected


def graded_manifest(folder: Path) -> np.ndarray:
    """Six one-second rows on three chunks of 15 s, with grades that tell the rows."""
    chunks = chunk_rows("a", (450, 450, 450), fps=30)
    samples = [sample_row(7.5 * i, 7.5 * i + 1, first=i // 2) for i in range(6)]
    grades = (np.arange(12).reshape(6, 2) / 16).astype(np.float32)
    captions = CaptionTable(("a", "b"), ((1,), (2,)), grades)
    write_manifest(folder, chunk_root="/chunks", chunks=chunks, samples=samples, captions=captions)
    return grades


def test_grades_lose_the_rows_that_samples_lose(tmp_path: Path) -> None:
    grades, before = graded_manifest(tmp_path), contents(tmp_path)
    done = repair_manifest(tmp_path, {"/chunks/a/15.mp4": ["truncated"]})
    repaired = Manifest(tmp_path)
    assert [s.start_s for s in repaired.samples()] == [0, 7.5, 30, 37.5]
    np.testing.assert_array_equal(open_captions(repaired).relevancy(np.arange(4)), grades[[0, 1, 4, 5]])
    size, checksum = repaired.files.checksums("relevancy.npy")[0]
    assert zlib.crc32(stored_file(tmp_path, "relevancy.npy").read_bytes()[:size]) == checksum
    # A later repair starts from what there was first.
    repair_manifest(tmp_path, {"/chunks/a/30.mp4": ["truncated"]})
    np.testing.assert_array_equal(open_captions(Manifest(tmp_path)).relevancy(np.arange(4)), grades[:4])
    subprocess.run(done.undo, shell=True, check=True)
    assert contents(tmp_path) == before


def test_restored_chunks_give_grades_back(tmp_path: Path) -> None:
    graded_manifest(tmp_path)
    before = contents(tmp_path)
    repair_manifest(tmp_path, {"/chunks/a/15.mp4": ["truncated"]})
    repair_manifest(tmp_path, {})
    assert contents(tmp_path) == before
