"""The decoding benchmarks, run small: what they compare, count and conclude, not how long anything takes."""

import dataclasses
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import av
import make_videos
import numpy as np
import pytest

from avion_dali.decode import cpu_fused
from benchmarks import media, report
from benchmarks.corpus import FOUR, SIXTEEN, STRIDED, draw_clips, write_chunks
from benchmarks.decode import backends, comparison, file_length, measure
from benchmarks.decode import report as decode_report
from benchmarks.decode.backends import MAKERS, Backend
from benchmarks.decode.measure import Case
from benchmarks.report import select

NOISE = "hand_held"
OWN = ("cpu-fused", "paper-fused", "reference", "pyav")
BENCH = comparison.Bench(("compat", "balanced"), OWN, clips=2, checked=1, rounds=2, frame_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def video(folder):
    return make_videos.write_video(folder / "numbered.mp4", frames=120)


@pytest.fixture(scope="module")
def chunks(folder, video):
    noise = media.write_video(folder / f"{NOISE}.mp4", media.SCENES[NOISE], frames=120, size=(128, 96))
    return write_chunks([video, noise], folder / "chunks", BENCH.profiles)


@pytest.fixture(scope="module")
def rows(chunks):
    return comparison.run(chunks, BENCH)


def off_by_one(request, frames_VTHWC):
    """The clip in another order: a library that mistakes frames."""
    cpu_fused.decode_clip(request, frames_VTHWC)
    frames_VTHWC[:] = frames_VTHWC[:, ::-1]


def raising(request, frames_VTHWC):
    raise OverflowError("no such frame\nand more")


def test_chunks_are_whole_and_indexed(chunks):
    assert {key[1] for key in chunks} == set(BENCH.profiles)
    assert {key[0] for key in chunks} == {"numbered", NOISE}
    for chunk in chunks.values():
        assert (chunk.num_frames, chunk.width, chunk.height) == (120, 128, 96)
        assert chunk.index is not None and chunk.index.num_bytes > 0


def test_clips_are_the_same_in_all_profiles_and_all_over_the_chunk(chunks):
    drawn = [draw_clips(chunks["numbered", profile], STRIDED, clips=8) for profile in BENCH.profiles]
    ids = [[clip.parts[0].frame_ids for clip in clips] for clips in drawn]
    assert ids[0] == ids[1]
    assert [clip.windows for clip in drawn[0]] == [clip.windows for clip in drawn[1]]
    assert all(len(clip) == len(set(clip)) == 16 and clip[-1] - clip[0] < 64 for clip in ids[0])
    starts = [clip[0] for clip in ids[0]]
    assert starts == sorted(starts) and starts[0] < 10 and starts[-1] > 45


def test_every_cell_has_a_row(rows):
    cells = {tuple(row[n] for n in ("source", "profile", "kind", "decoder")) for row in rows if "source" in row}
    wanted = {
        (source, profile, kind.name, decoder)
        for source in ("numbered", NOISE)
        for profile in BENCH.profiles
        for kind in (FOUR, SIXTEEN, STRIDED)
        for decoder in (OWN if kind == FOUR else ("cpu-fused", "paper-fused"))
    }
    assert cells == wanted
    assert all(row["cpu_ms_per_clip"] > 0 and row["min_psnr_db"] > 30 for row in rows if "source" in row)
    pooled = select(rows, "all sources", kind=FOUR.name)
    assert {(row["profile"], row["decoder"]) for row in pooled} == {(p, d) for p in BENCH.profiles for d in OWN}


def test_the_packet_plan_decodes_fewest_frames_and_reads_fewest_bytes(rows):
    for profile in BENCH.profiles:
        own = {
            name: select(rows, "all sources", profile=profile, kind=FOUR.name, decoder=name)[0] for name in OWN
        }
        assert own["cpu-fused"]["frames_decoded_per_frame"] < own["paper-fused"]["frames_decoded_per_frame"]
        assert own["pyav"]["frames_decoded_per_frame"] is None
        if Path("/proc/self/io").exists():
            assert own["cpu-fused"]["kb_read_per_clip"] < own["paper-fused"]["kb_read_per_clip"]


def test_tables_and_picture(rows, tmp_path):
    tables = decode_report.tables(rows)
    for source in ("numbered", NOISE, "all sources"):
        assert f"| {source} | `cpu-fused` | " in tables
    assert "paper-fused on compat" in tables
    decode_report.draw(rows).savefig(tmp_path / "decode.png")
    assert 5_000 < (tmp_path / "decode.png").stat().st_size < 150_000


def test_who_gives_wrong_frames_gets_no_time(chunks, monkeypatch):
    monkeypatch.setitem(MAKERS, "wrong", lambda: Backend("wrong", off_by_one, ""))
    monkeypatch.setitem(MAKERS, "raising", lambda: Backend("raising", raising, ""))
    few = {key: chunk for key, chunk in chunks.items() if key == ("numbered", "balanced")}
    bench = comparison.Bench(
        ("balanced",), (*OWN, "wrong", "raising"), clips=1, checked=1, rounds=1, frame_size=32
    )
    rows = comparison.run(few, bench)
    by_decoder = {row["decoder"]: row for row in select(rows, "clip", kind=FOUR.name)}
    assert by_decoder["wrong"]["min_psnr_db"] < 30
    assert by_decoder["raising"]["failure"] == "OverflowError: no such frame"
    assert [name for name, row in by_decoder.items() if "cpu_ms_per_clip" not in row] == ["wrong", "raising"]
    assert not select(rows, "all sources", decoder="wrong")


def test_our_own_decoders_must_agree_to_the_byte(chunks):
    clips = draw_clips(chunks["numbered", "balanced"], FOUR, clips=2, frame_size=32)
    good, bad = MAKERS["cpu-fused"](), Backend("bad", off_by_one, "")
    measure.require_equal(good, MAKERS["paper-fused"](), clips)
    with pytest.raises(RuntimeError, match="cpu-fused and bad differ on .*numbered.mp4"):
        measure.require_equal(good, bad, clips)


def test_agreement_is_measured(chunks):
    clips = draw_clips(chunks["numbered", "balanced"], FOUR, clips=1, frame_size=32)
    backend = MAKERS["cpu-fused"]()
    expected = measure.decoded(backend, clips)
    assert measure.compare(backend, clips, expected).is_identical
    shifted = [np.where(clip > 127, clip - 2, clip + 2).astype(np.uint8) for clip in expected]
    shifted[0][..., 0] = expected[0][..., 0]  # two of three channels differ by two levels
    found = measure.compare(backend, clips, shifted)
    assert found.is_right and not found.is_identical
    assert found.psnr_db == pytest.approx(10 * np.log10(255**2 / (4 * 2 / 3)), abs=0.01)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count bytes here")
def test_bytes_are_those_a_decoder_asks_for(chunks, tmp_path):
    data = tmp_path / "data"
    data.write_bytes(bytes(100_000))

    def read_some(request, frames_VTHWC):
        with open(data, "rb", buffering=0) as file:
            file.read(70_000)
            os.pread(file.fileno(), 5_000, 10)

    clips = draw_clips(chunks["numbered", "balanced"], FOUR, clips=3)
    counted = measure.bytes_read(Case(Backend("reader", read_some, ""), clips))
    assert counted == pytest.approx(75_000, abs=50)


def test_missing_libraries_are_named():
    found, missing = backends.load_backends(tuple(name for name in MAKERS if name != "torchcodec"))
    names = {backend.name for backend in found}
    assert {"cpu-fused", "paper-fused", "reference", "pyav"} <= names
    for name in ("decord", "spdl"):
        assert (name in names) != (name in missing)
        if importlib.util.find_spec(name) is None:
            assert missing[name] == "not installed"


def timed(profile, decoder, cpu_ms, source="s"):
    own = {"measured": "clip", "source": source, "profile": profile, "kind": FOUR.name, "decoder": decoder}
    rest = dict.fromkeys(("file_kb", "min_psnr_db"), 50.0)
    unknown = dict.fromkeys(("frames_decoded_per_frame", "kb_read_per_clip"))
    return {**own, **rest, **unknown, "cpu_ms_per_clip": cpu_ms, "cpu_ms_by_round": [cpu_ms, cpu_ms]}


def test_ratios_are_of_times_summed_over_sources():
    rows = [timed("compat", "paper-fused", 40.0), timed("compat", "paper-fused", 20.0, "t")]
    rows += [timed("balanced", "cpu-fused", 5.0), timed("balanced", "cpu-fused", 5.0, "t")]
    rows += [timed("compat", "cpu-fused", 30.0), timed("compat", "cpu-fused", 30.0, "t")]
    rows += [timed("compat", "torchcodec", 20.0), timed("compat", "torchcodec", 30.0, "t")]
    rows += decode_report.pooled(rows)
    found = {(row["slow"], row["fast"]): row for row in decode_report.ratios(rows)}
    balanced = found["paper-fused on compat", "cpu-fused on balanced"]
    assert balanced["ratio"] == 6.0 and balanced["by_source"] == {"s": 8.0, "t": 4.0}
    assert balanced["by_round"] == [6.0, 6.0] and decode_report.is_met(balanced)
    assert not decode_report.is_met(found["paper-fused on compat", "cpu-fused on compat"])
    fair = found["paper-fused on compat", "torchcodec on compat"]
    assert fair["ratio"] == 1.2 and not decode_report.is_met(fair)
    assert "VOID" in decode_report.tables([*rows, *found.values()])


def test_rounding_keeps_five_digits_and_words():
    row = {"a": [1.23456789, 7, None], "b": 123456.7, "c": "x", "d": True, "e": (0.123456789,)}
    assert report.rounded(row) == {"a": [1.2346, 7, None], "b": 123460.0, "c": "x", "d": True, "e": [0.12346]}


def test_longer_files_hold_the_same_clips(folder, chunks, monkeypatch, tmp_path):
    monkeypatch.setattr(file_length, "DECODERS", ("cpu-fused", "paper-fused"))
    bench = file_length.Bench(("balanced",), repeats=(1, 5), clips=3, rounds=1, frame_size=32)
    rows = file_length.run({k: c for k, c in chunks.items() if k[1] == "balanced"}, folder, bench)
    found = select(rows, "file")
    assert {(row["source"], row["seconds"]) for row in found} == {
        (source, seconds) for source in ("numbered", NOISE) for seconds in (4, 20)
    }
    growth = {row["decoder"]: row for row in select(rows, "growth")}
    assert set(growth) == {"cpu-fused", "paper-fused"}
    if Path("/proc/self/io").exists():
        read = {(r["source"], r["repeats"], r["decoder"]): r["kb_read_per_clip"] for r in found}
        for source in ("numbered", NOISE):
            assert read[source, 5, "cpu-fused"] < 1.1 * read[source, 1, "cpu-fused"] + 2
            assert read[source, 5, "paper-fused"] > 1.5 * read[source, 1, "paper-fused"]
    assert "| balanced, `cpu-fused` | " in file_length.tables(rows)
    file_length.draw(rows).savefig(tmp_path / "length.png")
    assert (tmp_path / "length.png").stat().st_size < 150_000


def test_a_decoder_that_errs_in_long_files_stops_the_run(chunks, folder, monkeypatch):
    broken = Backend("paper-fused", off_by_one, "")
    monkeypatch.setitem(MAKERS, "paper-fused", lambda: broken)
    monkeypatch.setattr(file_length, "DECODERS", ("cpu-fused", "paper-fused"))
    bench = file_length.Bench(("balanced",), repeats=(1,), clips=1, rounds=1, frame_size=32)
    with pytest.raises(RuntimeError, match="paper-fused gives other frames"):
        file_length.make_cases(
            "numbered", chunks["numbered", "balanced"], "balanced", folder=folder / "x", bench=bench
        )


def test_clips_of_long_files_come_from_everywhere(chunks):
    chunk = chunks["numbered", "balanced"]
    clips = draw_clips(chunk, FOUR, clips=4)
    long = dataclasses.replace(chunk, num_frames=40 * chunk.num_frames)
    moved = file_length.in_repetitions(clips, long, 40)
    shifts = [
        new.parts[0].frame_ids[0] - old.parts[0].frame_ids[0] for new, old in zip(moved, clips, strict=True)
    ]
    assert shifts == [0, 13 * 120, 26 * 120, 39 * 120]


def test_results_say_what_was_measured_where_and_name_their_picture(tmp_path):
    own = report.Benchmark("x", report.every_row, requirement={"a_at_least": 1})
    path = report.write_result(own, [{"measured": "y", "a": 1}], machine={}, folder=tmp_path)
    result = json.loads(path.read_text())
    assert result["picture"] is None and result["baseline"] == {"a_at_least": 1}
    assert result["benchmark"] == "x" and "av" in result["versions"]
    drawn = json.loads(report.write_result(comparison.BENCHMARK, [], machine={}, folder=tmp_path).read_text())
    assert drawn["picture"] == "docs/decode.png"
    with pytest.raises(ValueError, match="no key `measured`"):
        report.write_result(own, [{"a": 1}], machine={}, folder=tmp_path)


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_all_results_have_one_form(path, tmp_path):
    result = json.loads(path.read_text())
    written = report.write_result(
        report.Benchmark(path.stem, report.every_row), [], machine={}, folder=tmp_path
    )
    assert list(result) == list(json.loads(written.read_text()))
    assert result["benchmark"] == path.stem and result["rows"]
    assert all("measured" in row for row in result["rows"])
    assert result["picture"] is None or (report.ROOT / result["picture"]).is_file()


def test_other_libraries_find_the_ffmpeg_of_pyav(monkeypatch):
    seen = {}

    def record(command, env, check):
        folder = env["LD_LIBRARY_PATH"].split(os.pathsep)[0]
        seen.update(command=command, names=sorted(path.name for path in Path(folder).glob("lib*.so.*")))
        assert all(path.resolve().is_file() for path in Path(folder).iterdir())
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(backends.subprocess, "run", record)
    assert backends.rerun_with_pyav_libraries("benchmarks.decode") == 3
    assert seen["command"][1:3] == ["-m", "benchmarks.decode"]
    if Path(av.__file__).parents[1].joinpath("av.libs").is_dir():
        assert f"libavcodec.so.{av.library_versions['libavcodec'][0]}" in seen["names"]
    monkeypatch.setenv(backends._CHILD_MARK, "1")
    assert backends.rerun_with_pyav_libraries("benchmarks.decode") is None
