"""Tiny annotation files in the formats that data sets are published in, and a light tokenizer."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avion_dali.datasets import building
from avion_dali.datasets.building import BuildSettings

EPIC_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,"
    "stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)


def letters(text: str) -> tuple[int, ...]:
    """Token ids that are a text's letters."""
    return (49406, *(ord(c) % 1000 for c in text), 49407)


def use_light_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real tokenizer takes seconds to import and has its own tests."""
    monkeypatch.setattr(building, "clip_tokenizer", lambda: letters)


def settings(chunk_root: Path, output: Path, **options: Any) -> BuildSettings:
    return BuildSettings(chunk_root, output, jobs=1, **options)


def rejected_rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]


def write_pickle(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def epic_row(
    name: str,
    start: str = "00:00:00.20",
    stop: str = "00:00:00.80",
    *,
    narration: str = "wash cup",
    verb: int | str = 2,
    noun: int | str = 13,
    nouns: str | None = None,
    video: str = "P01_01",
) -> list[Any]:
    """One row; the words of verb and noun and the frame numbers are wrong: nobody may read them."""
    participant = video.partition("_")[0]
    all_nouns = f"[{noun}]" if nouns is None else nouns
    times = ("00:00:00.000", start, stop, 99_999, 99_999)
    return [name, participant, video, *times, narration, "?", verb, "?", noun, "['?']", all_nouns]


def write_epic(path: Path, rows: Iterable[Sequence[Any]], header: str = EPIC_HEADER) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(header + "\n")
        csv.writer(file).writerows(rows)
    return path


def write_sentences(path: Path, sentences: Iterable[tuple[str, str]]) -> Path:
    return write_epic(path, sentences, header="narration_id,narration")


def write_relevancy(path: Path, grades_RC: Any, dtype: str = "float64") -> Path:
    return write_pickle(path, np.asarray(grades_RC, dtype))


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
