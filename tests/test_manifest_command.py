"""`avion-dali manifest`: what each kind accepts, prints and refuses."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from annotation_files import (
    epic_row,
    use_light_tokenizer,
    write_epic,
    write_lines,
    write_pickle,
    write_relevancy,
    write_sentences,
)
from chunk_folders import copy_chunks

from avion_dali.cli import manifest
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest


@pytest.fixture(autouse=True)
def light_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    use_light_tokenizer(monkeypatch)


@pytest.fixture
def chunks(tmp_path: Path, chunk_file: Path) -> Path:
    return copy_chunks(chunk_file, tmp_path / "chunks", {"P01/P01_01.MP4": [0, 1], "uid.mp4": [0]})


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    manifest.add_arguments(parser)
    return manifest.run(parser.parse_args([*map(str, arguments), "--jobs", "1"]))


def test_ego4d(tmp_path: Path, chunks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickles = [
        write_pickle(
            tmp_path / "a.pkl", [("uid", 0.0, 1.0, ["x", "y"]), ("uid", 5.0, 6.0, "z"), ("no", 0.0, 1.0, "z")]
        ),
        write_pickle(tmp_path / "b.pkl", [("uid", 0.0, 0.5, "x")]),
    ]
    common = ("ego4d", "--chunks", chunks, "--annotations", *pickles, "--output", tmp_path / "m")
    with pytest.raises(UserError, match="2 of 4 rows"):
        run(*common)
    assert run(*common, "--skip-bad-rows") == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'm'}: 2 clips with 3 texts over 3 chunks\n" in out
    assert f"2 rows left out, listed in {tmp_path / 'm' / 'rejected.jsonl'}: " in out
    assert "1 past the end, 1 unknown video" in out


def test_ek100_recognition(tmp_path: Path, chunks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_epic(tmp_path / "EPIC_100_train.csv", [epic_row("a", verb=1, noun=2)])
    validation = write_epic(tmp_path / "elsewhere.csv", [epic_row("b", verb=0, noun=2)])
    common = (
        "ek100",
        "--chunks",
        chunks,
        "--annotations",
        train,
        "--output",
        tmp_path / "m",
        "--task",
        "recognition",
    )
    with pytest.raises(UserError, match="--classes-from"):
        run(*common)
    assert run(*common, "--classes-from", train, validation) == 0
    assert Manifest(tmp_path / "m").sample(0).label == 1
    assert "2 actions, but the published annotations have 3806" in capsys.readouterr().out


def test_ek100_retrieval(tmp_path: Path, chunks: Path) -> None:
    csv = write_epic(tmp_path / "EPIC_100_retrieval_test.csv", [epic_row("a")])
    sentences = write_sentences(tmp_path / "s.csv", [("a", "wash cup")])
    relevancy = write_relevancy(tmp_path / "r.pkl", np.ones((1, 1)))
    common = (
        "ek100",
        "--chunks",
        chunks,
        "--annotations",
        csv,
        "--output",
        tmp_path / "m",
        "--task",
        "retrieval",
    )
    assert run(*common, "--sentences", sentences, "--relevancy", relevancy) == 0
    assert Manifest(tmp_path / "m").info["num_captions"] == 1
    assert run(*common) == 0
    assert "num_captions" not in Manifest(tmp_path / "m").info
    with pytest.raises(UserError, match="must be given together"):
        run(*common, "--sentences", sentences)
    with pytest.raises(UserError, match="--classes-from is for --task recognition"):
        run(*common, "--classes-from", csv)
    with pytest.raises(UserError, match="are for --task retrieval"):
        run(*common[:-1], "recognition", "--sentences", sentences, "--relevancy", relevancy)


def test_kinetics(tmp_path: Path, chunks: Path) -> None:
    listing = write_lines(tmp_path / "list.txt", "P01/P01_01.MP4/0 30 0")
    common = ("kinetics", "--annotations", listing, "--output", tmp_path / "m")
    assert run(*common, "--videos", chunks) == 0
    assert Manifest(tmp_path / "m").num_chunks == 1
    write_lines(listing, "uid 30 0")
    assert run(*common, "--chunks", chunks) == 0
    assert Manifest(tmp_path / "m").num_chunks == 3
    for roots in ((), ("--videos", chunks, "--chunks", chunks)):
        with pytest.raises(SystemExit):
            run(*common, *roots)


def test_captions(tmp_path: Path, chunks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_lines(tmp_path / "x.csv", "video,start,end,text,label", "uid,0,1,look,b", "uid,0,1,see,a")
    common = ("captions", "--chunks", chunks, "--annotations", rows, "--output")
    assert run(*common, tmp_path / "m") == 0
    assert "2 clips over 3 chunks" in capsys.readouterr().out
    write_lines(rows, "video,start,end,text,label", "uid,0,1,look,b")
    assert run(*common, tmp_path / "held", "--classes-from", tmp_path / "m") == 0
    assert Manifest(tmp_path / "held").sample(0).label == 1


def test_captions_show_the_rows_as_they_are_placed(
    tmp_path: Path, chunks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(tmp_path / "x.csv", "video,start,end,text", "uid,0,1,look", "uid,0,1,see")
    run("captions", "--chunks", chunks, "--annotations", rows, "--output", tmp_path / "m")
    assert "rows: 2row" in capsys.readouterr().err
    with pytest.raises(UserError):
        run("captions", "--chunks", chunks, "--annotations", tmp_path / "no.csv", "--output", tmp_path / "m")
    assert capsys.readouterr().err == ""  # no bar before there is something to show


def test_unusable_chunks_are_listed_in_a_named_file(
    tmp_path: Path, chunks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (chunks / "P01" / "P01_01.MP4" / "1.mp4").write_bytes(b"")
    rows = write_lines(tmp_path / "x.csv", "video,start,end,text", "uid,0,1,look")
    run("captions", "--chunks", chunks, "--annotations", rows, "--output", tmp_path / "m")
    listing = tmp_path / "m" / "unusable_chunks.jsonl"
    assert f"1 chunk files left out, listed in {listing}\n" in capsys.readouterr().out
    assert listing.is_file()
