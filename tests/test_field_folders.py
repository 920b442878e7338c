"""Folders, names and annotation files as users have them: read, or named with the reason."""

import json
import os
import shutil
import unicodedata
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import field_videos as fv
import make_videos as mv
import numpy as np
import pytest
from field_videos import Style

from avion_dali.cli.main import main
from avion_dali.contracts import CropWindow, UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.data.scanning import ChunkNames
from avion_dali.datasets import building
from avion_dali.datasets.building import BuildReport, BuildSettings
from avion_dali.datasets.captions import read_captions_into
from avion_dali.datasets.plain import build_plain_manifest
from avion_dali.decode.reference import decode_clip


@pytest.fixture(autouse=True)
def _plain_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "clip_tokenizer", lambda: lambda text: (1, *range(len(text.split())), 2))


def build(chunks: Path, rows: Path | str, **settings: object) -> BuildReport:
    if isinstance(rows, str):
        path = chunks.parent / "rows.csv"
        path.write_text(rows)
        rows = path
    return read_captions_into(BuildSettings(chunks, chunks.parent / "m", jobs=1, **settings), rows)  # type: ignore[arg-type]


def shown(manifest: Path, row: int, *, frames: int = 1) -> list[int]:
    """Numbers that the clip of a row shows."""
    planner = Planner(Manifest(manifest), ClipRules(frames, 96, training=False), seed=0)
    request = planner.plan(row, 0)
    chunk = request.parts[0].chunk
    request = replace(request, windows=(CropWindow(0, 0, chunk.width, chunk.height),))  # all of the number
    clip = np.zeros(request.frames_shape, np.uint8)
    decode_clip(request, clip)
    return [mv.read_frame_number(picture) for picture in clip[0]]


# --- endings and folders


def test_all_videos_of_a_folder_are_cut_and_other_files_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "videos"
    (source / "deep").mkdir(parents=True)
    mpeg2 = Style("mpeg2video", options={"qscale": "3"}, container="vob")
    names = {"a.mp4": Style(), "b.MTS": Style(container="mpegts"), "c.m2ts": Style(container="mpegts")}
    names |= {"d.flv": Style(), "e.3gp": Style(), "deep/f.wmv": Style("wmv2", options={"qscale": "3"})}
    names |= {"g.vob": mpeg2, "h.gif": Style("gif", pix_fmt="rgb8"), "i.M4V": Style(container="mp4")}
    for name, style in names.items():
        fv.write(source / name, style, count=10)
    (source / "notes.txt").write_text("x")
    shutil.copy(source / "a.mp4", source / "unknown.dat")
    elsewhere = tmp_path / "other disk"
    elsewhere.mkdir()
    fv.write(elsewhere / "linked.mkv", count=10)
    (source / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(source)
    assert main(["chunk", str(source), "--output", str(tmp_path / "out"), "--short-side", "96"]) == 0
    told = capsys.readouterr()
    assert f"{len(names) + 1} of {len(names) + 1} videos done" in told.out
    assert "2 files are skipped (1 .txt, 1 .dat): notes.txt, unknown.dat" in told.err
    for name in names:
        assert mv.frame_numbers(tmp_path / "out" / Path(name).name / "0.mp4") == list(range(10)), name


def test_names_with_colons_quotes_and_bytes_that_are_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("v").mkdir()
    video = fv.write(Path("v") / "a.mp4", count=10)
    for name in ("12:30.mp4", "file:b.mp4", "%d 'q' [x].mp4"):
        shutil.copy(video, Path("v") / name)
    shutil.copy(video, "7:15.mp4")
    shutil.copy(video, os.path.join(os.fsencode("v"), b"over\xe9.mp4"))
    assert main(["chunk", "v", "7:15.mp4", "--output", "out", "--short-side", "96"]) == 0
    assert "6 of 6 videos done" in capsys.readouterr().out
    rows = "video,start,end,text\na,0,0.2,x\n12:30,0,0.2,x\n%d 'q' [x],0,0.2,x\n7:15,0,0.2,x\n"
    report = build(tmp_path / "out", rows)
    assert report.num_samples == 4
    assert [bad.reason for bad in report.unusable] == ["its name is not UTF-8; rename it"]
    assert "over" in (tmp_path / "m" / "unusable_chunks.jsonl").read_text()
    for row in range(4):
        assert shown(tmp_path / "m", row) == [3]
    assert main(["check", "out", "--output", "check", "--jobs", "1"]) == 0
    assert "over" in (tmp_path / "check" / "progress.jsonl").read_text()


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_match_whichever_way_they_are_written(tmp_path: Path, form: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    folder = tmp_path / "chunks" / unicodedata.normalize(form, "café für é.mp4")
    folder.mkdir(parents=True)
    fv.write(folder / "0.mp4", count=30)
    name = unicodedata.normalize(other, "café für é")
    assert build(tmp_path / "chunks", f"video,start,end,text\n{name},0.5,0.5,x\n").num_samples == 1
    assert shown(tmp_path / "m", 0) == [15]


# --- names of chunks


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of 2 s, numbered through."""
    folder = tmp_path_factory.mktemp("pieces")
    for index in range(3):
        fv.write(folder / f"{index}.mp4", rate=10, count=20, first=20 * index)
    return folder


def named(pieces: Path, root: Path, names: list[str]) -> Path:
    (root / "kitchen").mkdir(parents=True)
    for index, name in enumerate(names):
        shutil.copy(pieces / f"{index}.mp4", root / "kitchen" / f"{name}.mp4")
    return root


ROWS = "video,start,end,text\nkitchen,1.2,1.2,a\nkitchen,4.5,4.5,b\n"


@pytest.mark.parametrize("names", [["0", "1", "2"], ["000", "001", "002"], ["1", "2", "3"]])
def test_pieces_that_are_counted(tmp_path: Path, pieces: Path, names: list[str]) -> None:
    chunks = named(pieces, tmp_path / "chunks", names)
    with pytest.raises(UserError, match=r"overlap.*\(\d, \d, \d, .*--chunk-names index --chunk-seconds 2"):
        build(chunks, ROWS)
    assert build(chunks, ROWS, names=ChunkNames("index", 2)).num_samples == 2
    assert [shown(tmp_path / "m", row) for row in range(2)] == [[12], [45]]
    with pytest.raises(UserError, match="overlap.*--chunk-seconds 2"):
        build(chunks, ROWS, names=ChunkNames("index", 1))


@pytest.mark.parametrize("names", [["0", "2000", "4000"], ["0", "20", "40"]])
def test_names_that_count_milliseconds_or_frames(tmp_path: Path, pieces: Path, names: list[str]) -> None:
    chunks = named(pieces, tmp_path / "chunks", names)
    with pytest.raises(UserError, match="leave gaps.*names must be start seconds.*--chunk-names start"):
        build(chunks, ROWS)
    with pytest.raises(UserError, match="is missing"):
        build(chunks, ROWS, names=ChunkNames("start"))


@pytest.mark.parametrize("names", [["0", "2", "4"], ["0", "2.0", "4"], ["0", "2", "9"], ["0", "1.9", "3.8"]])
def test_start_seconds_are_taken_as_they_are(tmp_path: Path, pieces: Path, names: list[str]) -> None:
    chunks = named(pieces, tmp_path / "chunks", names)
    assert build(chunks, "video,start,end,text\nkitchen,1.2,1.2,a\n").num_samples == 1
    assert shown(tmp_path / "m", 0) == [12]


def test_names_are_checked_on_the_command_line(
    tmp_path: Path, pieces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chunks = named(pieces, tmp_path / "chunks", ["0", "1", "2"])
    (chunks / "kitchen" / "intro.mp4").write_bytes(b"")
    (tmp_path / "rows.csv").write_text(ROWS)
    command = ["manifest", "captions", "--chunks", str(chunks), "--annotations", str(tmp_path / "rows.csv")]
    command += ["--output", str(tmp_path / "m"), "--jobs", "1"]
    with pytest.raises(UserError, match="needs --chunk-seconds"):
        main([*command, "--chunk-names", "index"])
    with pytest.raises(UserError, match="requires --chunk-names index"):
        main([*command, "--chunk-seconds", "2"])
    assert main([*command, "--chunk-names", "index", "--chunk-seconds", "2"]) == 0
    assert "1 videos skipped because their names are not numbers: intro.mp4" in capsys.readouterr().out
    assert main(["check", str(chunks), "--output", str(tmp_path / "check"), "--jobs", "1"]) == 0
    assert "chunk-names" in capsys.readouterr().out


# --- annotation files


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of `garden` in chunks of a second, and one of `pond`."""
    root = tmp_path_factory.mktemp("garden") / "chunks"
    for video, start in (("garden.mp4", 0), ("garden.mp4", 1), ("garden.mp4", 2), ("pond.mp4", 0)):
        (root / video).mkdir(parents=True, exist_ok=True)
        fv.write(root / video / f"{start}.mp4", count=30, first=30 * start)
    return root


@pytest.mark.parametrize(
    ("name", "content", "spans"),
    [
        ("r.csv", "video,text\ngarden,a\npond,b\n", [(0, 3), (0, 1)]),
        ("r.csv", "video,start,end,text\ngarden,,,a\npond,0,,b\ngarden,,1.5,c\n", [(0, 3), (0, 1), (0, 1.5)]),
        ("r.csv", "video,start,end,text\ngarden,1.25,,a\n", [(1.25, 3)]),
        ("r.csv", "video,label\ngarden,7\npond,9\n", [(0, 3), (0, 1)]),
        ("r.jsonl", '{"video": "garden", "text": ["a", "b"]}\n', [(0, 3)]),
        ("r.jsonl", '{"video": "pond", "start": null, "end": null, "text": "a"}\n', [(0, 1)]),
    ],
)
def test_rows_without_times_mean_the_whole_video(
    tmp_path: Path, garden: Path, name: str, content: str, spans: list[tuple[float, float]]
) -> None:
    (tmp_path / name).write_text(content)
    settings = BuildSettings(garden, tmp_path / "m", jobs=1)
    report = read_captions_into(settings, tmp_path / name)
    assert [(s.start_s, s.end_s) for s in Manifest(tmp_path / "m").samples()] == spans
    says_so = any("refers to its whole video" in note for note in report.notes)
    assert says_so == any(span in ((0, 3), (0, 1)) for span in spans) or name == "r.csv"


@pytest.mark.parametrize("number", ["1_0", "0_1", "١", "1,5", "0x1", "1e", "--1", "1 0"])
def test_numbers_that_only_python_reads_are_bad_numbers(tmp_path: Path, garden: Path, number: str) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps({"video": "garden", "start": number, "end": 2, "text": "x"}))
    with pytest.raises(UserError, match="is not a number of seconds"):
        read_captions_into(BuildSettings(garden, tmp_path / "m", jobs=1), tmp_path / "r.jsonl")


@pytest.mark.parametrize("number", ["1", " 1.5 ", "+0.5", ".5", "1.", "1e0", "5E-1"])
def test_plain_numbers_are_read(tmp_path: Path, garden: Path, number: str) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps({"video": "garden", "start": number, "end": 2, "text": "x"}))
    read_captions_into(BuildSettings(garden, tmp_path / "m", jobs=1), tmp_path / "r.jsonl")
    assert Manifest(tmp_path / "m").sample(0).start_s == float(number)


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("['a dog', \"the dog's tail\"]", ("a dog", "the dog's tail")),
        ('["one", "two", "three"]', ("one", "two", "three")),
        ("['only one']", ("only one",)),
        ("[applause] and music", ("[applause] and music",)),
        ("[applause]", ("[applause]",)),
        ("[1, 2]", ("[1, 2]",)),
        ("[]", ("[]",)),
        ("[" * 3000 + "]" * 3000, ("[" * 3000 + "]" * 3000,)),
    ],
)
def test_lists_in_text_cells_are_several_texts(
    tmp_path: Path, garden: Path, cell: str, texts: tuple[str, ...]
) -> None:
    quoted = cell.replace('"', '""')
    (tmp_path / "r.csv").write_text(f'video,start,end,text\ngarden,0,1,"{quoted}"\n')
    report = read_captions_into(BuildSettings(garden, tmp_path / "m", jobs=1), tmp_path / "r.csv")
    assert Manifest(tmp_path / "m").sample(0).texts == texts
    assert any("contain a list" in note for note in report.notes) == (texts[0] != cell)


def test_texts_longer_than_a_text_tower_sees_are_counted(tmp_path: Path, garden: Path) -> None:
    texts = {75: 0, 76: 1, 300: 1}  # and two markers
    rows = "".join(f"garden,0,1,{' '.join(['word'] * length)}\n" for length in texts)
    (tmp_path / "r.csv").write_text("video,start,end,text\n" + rows)
    report = read_captions_into(BuildSettings(garden, tmp_path / "m", jobs=1), tmp_path / "r.csv")
    assert "2 of 3 texts are longer than the 77 tokens" in report.notes[0]
    tokens = [sample.tokens[0] for sample in Manifest(tmp_path / "m").samples()]
    assert [(len(ids), ids[-1]) for ids in tokens] == [(77, 2)] * 3


# --- files that are used as they are


def test_clips_of_pixels_that_are_not_square_are_not_squeezed(tmp_path: Path) -> None:
    chunks = tmp_path / "chunks"
    for video, aspect in (("square", None), ("wide", Fraction(2)), ("narrow", Fraction(1, 2))):
        (chunks / video).mkdir(parents=True)
        fv.write(chunks / video / "0.mp4", aspect=aspect, count=10)
    build(chunks, "video,start,end,text\nnarrow,0,0.2,a\nsquare,0,0.2,a\nwide,0,0.2,a\n")
    planner = Planner(Manifest(tmp_path / "m"), ClipRules(1, 96, training=False), seed=0)
    windows = [planner.plan(row, 0).windows[0] for row in range(3)]
    assert [(w.x, w.y, w.width, w.height) for w in windows] == [
        (0, 16, 128, 64),
        (16, 0, 96, 96),
        (40, 0, 48, 96),
    ]
    training = Planner(Manifest(tmp_path / "m"), ClipRules(1, 96, training=True), seed=0)
    for row, aspect in ((0, 0.5), (2, 2.0)):
        for epoch in range(30):
            window = training.plan(row, epoch).windows[0]
            assert 0.6 < window.width * aspect / window.height < 1.6


def test_manifests_from_before_these_columns_still_open(tmp_path: Path, garden: Path) -> None:
    import pyarrow as pa

    read_captions_into(BuildSettings(garden, tmp_path / "m", jobs=1), _rows(tmp_path))
    _as_format_3(tmp_path / "m")
    path = tmp_path / "m" / "chunks.arrow"
    with pa.ipc.open_file(path) as reader:
        table = reader.read_all().drop_columns(["last_s", "pixel_aspect"])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    chunk = Manifest(tmp_path / "m").chunk(1)
    assert (chunk.start_s, chunk.end_s, chunk.pixel_aspect, chunk.last_s) == (1.0, 2.0, 1.0, 0.0)
    assert shown(tmp_path / "m", 0) == [15]


def _as_format_3(folder: Path) -> None:
    """Lay a manifest out as before its files had folders and checksums of their own."""
    info = json.loads((folder / "manifest.json").read_text())
    for name, facts in info.pop("files").items():
        (folder / facts["path"]).rename(folder / name)
    (folder / "manifest.json").write_text(json.dumps({**info, "format_version": 3}))


def _rows(folder: Path) -> Path:
    (folder / "r.csv").write_text("video,start,end,text\ngarden,0.5,0.5,x\n")
    return folder / "r.csv"


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_videos_without_annotations_are_turned_upright(tmp_path: Path, degrees: int) -> None:
    """Phones store pictures as the sensor lies; embeddings are of what a player shows."""
    videos = tmp_path / "videos"
    videos.mkdir()

    def turned(number: int, size: tuple[int, int]) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(mv.draw_frame(number, (96, 96)), -degrees // 90))

    phone = mv.write_video(videos / "phone.mp4", frames=12, size=(96, 96), rotation=degrees, draw=turned)
    plain = fv.write(videos / "plain.mp4", count=12, first=50)
    settings = BuildSettings(videos, tmp_path / "work" / "manifest", skip_bad_rows=True, jobs=1)
    report = build_plain_manifest(settings, [phone, plain])
    assert (report.num_samples, report.unusable) == (2, ())
    manifest = tmp_path / "work" / "manifest"
    assert [shown(manifest, row) for row in range(2)] == [[6], [56]]
    assert Manifest(manifest).chunk(0).video == "phone.mp4"


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("delay", [9, 30])
def test_foreign_chunks_whose_picture_is_late(tmp_path: Path, ending: str, delay: int) -> None:
    folder = tmp_path / "chunks" / "v"
    folder.mkdir(parents=True)
    video = fv.write(folder / f"0.{ending}", delay=delay, sound_seconds=3, count=60)
    times = [0.0, delay / 30 - 0.1, delay / 30 + 0.01, delay / 30 + 1.01, delay / 30 + 1.95]
    rows = "".join(f"v,{time},{time},x\n" for time in times)
    assert build(tmp_path / "chunks", "video,start,end,text\n" + rows).num_samples == len(times)
    known = fv.timeline(video)
    for row, time in enumerate(times):
        assert shown(tmp_path / "m", row)[0] in fv.on_show(known, time)
