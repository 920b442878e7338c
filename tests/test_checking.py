"""Nothing is looked at twice, no file ends a check, and what is found is reported and mended."""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import make_videos as mv
import pytest
from checked_chunks import BROKEN_LENGTH, BT601, build, lay_out, make_sound, write_over

from avion_dali.cli.check import add_arguments, run
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.inspection.checking import CheckReport, CheckSettings, check_chunks, supervise
from avion_dali.inspection.findings import KINDS, Finding


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames that nothing can be said against."""
    return make_sound(tmp_path_factory.mktemp("sound"))


def test_a_process_that_dies_or_hangs_costs_its_file() -> None:
    results = dict(supervise(os._exit, [7], jobs=1, timeout_s=30))
    assert results[7] == Finding("crashed", "its process ended with code 7")
    results = dict(supervise(time.sleep, [0.0, 60.0, 0.01], jobs=2, timeout_s=1))
    assert (results[0.0], results[0.01]) == (None, None)
    assert results[60.0] == Finding("timeout", "no answer within 1 s")


def check(source: Path, output: Path, **settings: object) -> CheckReport:
    return check_chunks(source, output, settings=CheckSettings(**{"jobs": 1, **settings}))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_a_second_check_looks_at_changed_files_only(sound: Path, tmp_path: Path) -> None:
    chunks, output = lay_out(sound, tmp_path / "c"), tmp_path / "out"
    first, second, third = sorted((chunks / "video").iterdir())
    os.truncate(first, 2000)
    report = check(chunks, output)
    assert (report.num_files, report.num_kept) == (3, 0)
    assert report.bad_chunks == {str(first): ["truncated"]}
    progress = lines(output / "progress.jsonl")
    findings = lines(output / "findings.jsonl")
    assert [(row["severity"], row["kind"], row["path"]) for row in findings] == [
        ("error", "truncated", str(first))
    ]
    # Of a file that seems unchanged nothing is read: this damage is to be missed.
    stamp = second.stat()
    second.write_bytes(bytes(stamp.st_size))
    os.utime(second, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    again = check(chunks, output)
    assert (again.num_kept, again.bad_chunks) == (3, report.bad_chunks)
    assert lines(output / "progress.jsonl") == progress
    assert lines(output / "findings.jsonl") == findings
    os.utime(second)
    assert check(chunks, output).bad_chunks == {str(first): ["truncated"], str(second): ["undecodable"]}
    shutil.copyfile(sound, first)
    shutil.copyfile(sound, second)
    mended = check(chunks, output)
    assert (mended.num_kept, mended.bad_chunks, mended.tallies) == (1, {}, {})
    assert (output / "findings.jsonl").read_text() == ""
    # A deep check has more to see, a quick one after it has not.
    assert [check(chunks, output, deep=deep).num_kept for deep in (True, False, True)] == [0, 3, 3]


def test_a_killed_check_goes_on_where_it_was(sound: Path, tmp_path: Path) -> None:
    chunks, output = lay_out(sound, tmp_path / "c", 4), tmp_path / "out"
    check(chunks, output)
    progress = output / "progress.jsonl"
    whole = progress.read_text()
    rows = whole.splitlines(keepends=True)
    for torn in ("".join(rows[:3]) + rows[3][:-2], "".join(rows[:3]) + rows[3][:20], "".join(rows[:3])):
        progress.write_text(torn)
        assert check(chunks, output).num_kept == 2
        assert check(chunks, output).num_kept == 4
    progress.write_text(rows[0][:10])
    assert check(chunks, output).num_kept == 0
    assert progress.read_text() == whole


def test_what_may_pass_is_tried_again(sound: Path, tmp_path: Path) -> None:
    manifest, output = build(lay_out(sound, tmp_path / "c"), tmp_path / "m"), tmp_path / "out"
    gone = tmp_path / "c" / "video" / "1.mp4"
    gone.rename(tmp_path / "kept")
    os.mkfifo(gone)  # to open it is to wait for ever
    report = check(manifest, output, timeout_s=1.5)
    assert report.bad_chunks == {str(gone): ["timeout"]}
    gone.unlink()
    report = check(manifest, output)
    assert (report.num_kept, report.bad_chunks) == (2, {str(gone): ["missing"]})
    (tmp_path / "kept").rename(gone)
    report = check(manifest, output)
    assert (report.num_kept, report.bad_chunks) == (2, {})


def test_a_manifest_built_anew_is_checked_anew_and_a_repaired_one_is_not(sound: Path, tmp_path: Path) -> None:
    chunks = lay_out(sound, tmp_path / "c")
    manifest, output = build(chunks, tmp_path / "m"), tmp_path / "out"
    check(manifest, output)
    info = json.loads((manifest / "manifest.json").read_text())
    (manifest / "manifest.json").write_text(json.dumps(info | {"fingerprint": 1}))
    assert check(manifest, output).num_kept == 3
    time.sleep(0.01)
    build(chunks, manifest)
    assert check(manifest, output).num_kept == 0
    with pytest.raises(UserError, match="--output"):
        check(chunks, output)


def test_many_frame_sizes_are_one_finding(tmp_path: Path) -> None:
    (tmp_path / "c" / "v").mkdir(parents=True)
    for i in range(9):
        mv.write_video(tmp_path / "c" / "v" / f"{i}.mp4", frames=1, fps=1, size=(64 + 16 * i, 48), **BT601)
    report = check(tmp_path / "c", tmp_path / "out")
    assert list(report.tallies) == ["many-sizes"]
    assert report.tallies["many-sizes"].count == 1
    (tmp_path / "c" / "v" / "8.mp4").unlink()
    assert check(tmp_path / "c", tmp_path / "out").tallies == {}


def command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([*map(str, words), "--jobs", "1"]))


def test_the_command_reports_and_repairs(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chunks = lay_out(sound, tmp_path / "c")
    manifest = build(chunks, tmp_path / "m")
    bad = chunks / "video" / "1.mp4"
    assert command(manifest, "--repair-manifest") == 0
    assert Manifest(manifest).num_samples == 5
    write_over(bad, 20, BROKEN_LENGTH)
    assert command(manifest) == 0
    assert "3 of them unchanged" in capsys.readouterr().out
    assert command(manifest, "--deep", "--repair-manifest") == 1
    out = capsys.readouterr().out
    assert f"{manifest}: 3 files checked, 1 with errors" in out
    assert f"checksum              1  {bad}" in out
    assert KINDS["checksum"].advice in out
    assert "3 clips removed, 2 left" in out and "to undo: mv " in out
    assert lines(tmp_path / "check-m" / "findings.jsonl")[0]["kind"] == "checksum"
    planner = Planner(Manifest(manifest), ClipRules(num_frames=4, frame_size=32, training=True), seed=0)
    plans = [planner.plan(i, 0) for i in range(planner.manifest.num_samples)]
    assert {p.chunk.path for plan in plans for p in plan.parts} == {
        str(chunks / "video" / name) for name in ("0.mp4", "2.mp4")
    }


def test_warnings_do_not_fail_and_misuse_is_explained(sound: Path, tmp_path: Path) -> None:
    chunks = lay_out(sound, tmp_path / "c", 1)
    mv.write_video(chunks / "video" / "7.mp4", frames=5, size=(100, 76))
    output = ("--output", tmp_path / "out")
    assert command(chunks, *output) == 0
    assert {row["kind"] for row in lines(tmp_path / "out" / "findings.jsonl")} == {"untagged", "nvdec-size"}
    with pytest.raises(UserError, match="is not a manifest"):
        command(chunks, "--repair-manifest", *output)
    with pytest.raises(UserError, match="is not a folder"):
        command(tmp_path / "nowhere", *output)
    with pytest.raises(UserError, match="cannot be written to"):
        command(chunks, "--output", sound)
    with pytest.raises(UserError, match="negative"):
        command(chunks, "--timeout", -1)
    manifest = build(chunks, tmp_path / "m")
    shutil.rmtree(chunks)
    with pytest.raises(UserError, match="chunk_root"):
        command(manifest, *output)
