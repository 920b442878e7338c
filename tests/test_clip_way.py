"""The way of one clip is the one in `docs/architecture.md`: a traced training step shows these functions only.

A function is a step of the way when it is given or returns the clip as a whole (`is_clip`), or when another
module gives it a part of one and gets packets, pictures or pixels back (`is_part`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import make_videos
import numpy as np
import pytest
import torch
from annotation_files import write_lines
from av.video.frame import VideoFrame
from dali_clips import VP9
from launch_data import manifest as make_manifest
from test_layering import ALLOWED, FOR_ALL

from avion_dali.assembly.training import training
from avion_dali.config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig
from avion_dali.contracts import ClipBatch, ClipPart, ClipRequest
from avion_dali.decode.source import PartPackets
from avion_dali.engine.distributed import Distributed
from avion_dali.loading import worker
from avion_dali.loading.clip_group import ClipGroup, GroupResult, work_on
from avion_dali.loading.strategy import PendingBatch
from avion_dali.models.blocks import VideoEncoder
from avion_dali.models.dual_encoder import DualEncoder
from avion_dali.models.presets import PRESETS
from pipelines.mini_clip import MiniClip
from pipelines.mini_clip_worker import CollectedClip

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text()
CLIPS = 3
LIMITS = {"cpu-fused": 20, "dali": 24}
TOWERS = {VideoEncoder.forward.__code__, DualEncoder.encode_text.__code__}
NAMED = re.compile(r"`([\w/]+\.py)` `([\w.]+)`")

# Functions that are given the clip and are no steps. The document names them, too.
NOT_COUNTED = {
    # A loop: keeps batches in flight, calls the steps, and hands on what they return.
    ("avion_dali/loading/clip_loader.py", "_deliver"),
    # They look at the clip and give none of it back: which rows, whether it is usable, how a failure is called.
    ("avion_dali/loading/worker.py", "failures_as_decode_errors"),
    ("avion_dali/objectives/clips.py", "require_one_view"),
    ("avion_dali/objectives/clips.py", "batch_augmentation"),
    ("pipelines/codecs.py", "require_decodable"),
    ("pipelines/dali_strategy.py", "_rows_for_graph"),
    # The way of the text, the label and the ids.
    ("avion_dali/loading/clip_group.py", "of"),
    ("avion_dali/models/dual_encoder.py", "encode_text"),
}

Function = tuple[str, str]


def is_clip(value: Any, depth: int = 3) -> bool:
    """Tell whether a value is the clip, or the batch it is in, in one of its forms, or holds one."""
    if isinstance(value, torch.Tensor):
        rows = value.ndim >= 2 and value.shape[0] == CLIPS
        return rows and (value.is_floating_point() or value.dtype == torch.uint8)
    if isinstance(value, np.ndarray):
        return value.ndim >= 4 and value.dtype == np.uint8
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return depth > 0 and any(is_clip(part, depth - 1) for part in value)
    forms = (ClipGroup, ClipRequest, CollectedClip, MiniClip, GroupResult, Future, PendingBatch, ClipBatch)
    return isinstance(value, forms)


def is_graph_input(value: Any) -> bool:
    """Tell whether a value is what the DALI graph takes: a list of mini clips, and arrays of numbers."""
    is_inputs = isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], list)
    return is_inputs and all(isinstance(array, np.ndarray) for array in [*value[0], *value[1:]])


def is_part(value: Any) -> bool:
    """Tell whether a value is what a part of a clip becomes in a worker."""
    if isinstance(value, (list, tuple)):
        return any(map(is_part, value))
    is_pixels = isinstance(value, np.ndarray) and value.ndim == 3 and value.dtype == np.uint8
    return is_pixels or isinstance(value, (ClipPart, PartPackets, VideoFrame))


def path_of(code: CodeType) -> str:
    """Return a source file's path in this project; empty for those of other libraries."""
    path = Path(code.co_filename)
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    return name if name.startswith(("avion_dali/", "pipelines/")) else ""


def arguments_of(frame: FrameType) -> list[Any]:
    code = frame.f_code
    stars = bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars]
    return [frame.f_locals[name] for name in names if name in frame.f_locals and name != "self"]


def callers_of(frame: FrameType) -> Iterator[CodeType]:
    above = frame.f_back
    while above is not None:
        yield above.f_code
        above = above.f_back


class Trace:
    """Notes the functions of this project that handle a clip while it is entered."""

    def __init__(self) -> None:
        self.found: set[Function] = set()
        self._given: set[FrameType] = set()  # calls from another module with a part of a clip

    def __enter__(self) -> Trace:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not (path := path_of(code)):
            return
        # Values check themselves; comprehensions belong to their function; a tower is one step.
        if path == "avion_dali/contracts.py" or code.co_name in ("__init__", "__post_init__"):
            return
        if code.co_name in ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"):
            return
        if not TOWERS.isdisjoint(callers_of(frame)):
            return
        if event == "return":
            is_step = (frame in self._given and is_part(value)) or is_clip(value) or is_graph_input(value)
            self._given.discard(frame)
        else:
            values = arguments_of(frame)
            is_step = any(is_clip(value) or is_graph_input(value) for value in values)
            caller = next((c for c in callers_of(frame) if not c.co_name.startswith("<")), code)
            if caller.co_filename != code.co_filename and is_part(values):
                self._given.add(frame)
        if is_step:
            self.found.add((path, code.co_name))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("way")
    chunk = folder / "chunks" / "a.MP4" / "0.mp4"
    chunk.parent.mkdir(parents=True)
    make_videos.write_video(chunk, frames=90, size=(64, 48), **VP9)
    rows = [f"a,{i / 5:.1f},{i / 5 + 1:.1f},cut the carrot {i}" for i in range(2 * CLIPS)]
    csv = write_lines(folder / "rows.csv", "video,start,end,text", *rows)
    make_manifest(
        "captions", "--chunks", folder / "chunks", "--annotations", csv, "--output", folder / "manifest"
    )
    return folder / "manifest"


def make_config(manifest: Path, decoder: str, output: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=str(output),
        decoder=decoder,
        data=DataConfig(train_manifest=str(manifest), num_frames=4, frame_size=32, workers=1),
        model=ModelConfig(size="tiny", embed_dim=16, context_length=8, attention="sdpa"),
        objective=ObjectiveConfig(name="contrastive"),
        optim=OptimConfig(global_batch=CLIPS, micro_batch=CLIPS, epochs=4),
        run=RunConfig(precision="fp32"),
    )


def traced_step(config: TrainConfig, extra: Callable[[], None] = lambda: None) -> set[Function]:
    """Trace one training step, and what a worker does for a group of one clip, in this process."""
    smaller = replace(PRESETS["tiny"], video_layers=1, text_layers=1, text_width=32, text_heads=2)
    trace = Trace()
    with patch.dict(PRESETS, tiny=smaller), training(config, Distributed()) as loop:
        loader: Any = loop.loader
        steps = loop.steps(0, 2)
        with trace:
            next(steps)
            extra()
        group = loader._group(0, [0], loader._ring.place(0, 0))
        with patch.dict(worker._attached, clear=True), trace:
            work_on(loader._strategy.task, group)
    return trace.found


def listed(decoder: str) -> list[Function]:
    """The numbered steps of the document."""
    section = DOCUMENT.partition(f"### With `--decoder {decoder}`")[2].partition("\n#")[0]
    lines = re.findall(r"^(\d+)\. (.*)$", section, flags=re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1)) and lines
    found = [NAMED.match(text) for _, text in lines]
    assert all(found), section
    return [(match[1], match[2].rpartition(".")[2]) for match in found if match]


@pytest.mark.parametrize("decoder", LIMITS)
def test_the_way_is_the_one_in_the_document(decoder: str, manifest: Path, tmp_path: Path) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    steps = listed(decoder)
    assert len(set(steps)) == len(steps) <= LIMITS[decoder]
    found = traced_step(make_config(manifest, decoder, tmp_path))
    assert found - NOT_COUNTED == set(steps)


def test_a_hop_more_is_seen(manifest: Path, tmp_path: Path) -> None:
    """A function between the loop and the objective, in a file of this project, belongs to the way."""
    hop = "def hop(batch, then):\n    return then(batch)\n"
    names: dict[str, Any] = {}
    exec(compile(hop, str(ROOT / "avion_dali" / "engine" / "hop.py"), "exec"), names)
    batch = ClipBatch(torch.zeros(CLIPS, 1, 8, 8, 3, dtype=torch.uint8), None, None, *[np.arange(CLIPS)] * 3)
    config = make_config(manifest, "cpu-fused", tmp_path)
    found = traced_step(config, extra=lambda: names["hop"](batch, id))
    assert found - NOT_COUNTED - set(listed("cpu-fused")) == {("avion_dali/engine/hop.py", "hop")}


def test_what_is_not_counted_is_named_in_the_document() -> None:
    section = DOCUMENT.partition("### What is not counted")[2].partition("\n#")[0]
    named = {(path, name.rpartition(".")[2]) for path, name in NAMED.findall(section)}
    assert named == NOT_COUNTED


def test_every_step_exists() -> None:
    for path, name in {*listed("cpu-fused"), *listed("dali"), *NOT_COUNTED}:
        assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text(), flags=re.MULTILINE), (path, name)


def test_the_document_has_a_line_for_every_folder() -> None:
    section = DOCUMENT.partition("## The folders")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `([\w/.]+)/` \| (.+) \|$", section, flags=re.MULTILINE)
    rooms = {f"avion_dali/{p.parent.name}" for p in (ROOT / "avion_dali").glob("*/__init__.py")}
    others = {"avion_dali", "pipelines", "train", "configs", "benchmarks", "examples", "tests", "docs"}
    assert {folder for folder, _ in named} == rooms | others
    assert all(len(phrase) < 140 for _, phrase in named)


def test_the_document_has_the_import_directions_that_are_tested() -> None:
    section = DOCUMENT.partition("## Who imports whom")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, flags=re.MULTILINE)
    found = {room: set(re.findall(r"`(\w+)`", names)) for room, names in rows}
    assert found == {room: names for room, names in ALLOWED.items() if room and room not in FOR_ALL}
