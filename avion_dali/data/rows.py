"""Rows of a manifest's two tables: as objects, and as views of Arrow columns."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa

from avion_dali.contracts import ChunkRef
from avion_dali.data.tables import Lists, Strings, lists, numbers, strings

CHUNK_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # relative to the chunk folder
        ("video", pa.string()),
        ("start_s", pa.float64()),  # where the chunk begins in its video
        ("fps_num", pa.int32()),
        ("fps_den", pa.int32()),
        ("num_frames", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("size_bytes", pa.int64()),
        ("codec", pa.string()),
        ("frame_times", pa.list_(pa.float64())),  # null where frame i is shown at i / fps
        ("index_offset", pa.int64()),  # of its record in packets.bin
        ("index_bytes", pa.int32()),  # 0 for a chunk without index
        ("last_s", pa.float64()),  # seconds that the last frame is shown
        ("pixel_aspect", pa.float64()),  # width of a pixel divided by its height
    ]
)
# Columns that manifests of earlier builds lack, and what stands for them.
_LATER_COLUMNS = {"last_s": 0.0, "pixel_aspect": 1.0}
SAMPLE_SCHEMA = pa.schema(
    [
        ("first_chunk", pa.int32()),
        ("num_chunks", pa.int16()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("texts", pa.list_(pa.string())),
        ("tokens", pa.list_(pa.list_(pa.uint16()))),  # one list a text
        ("verb", pa.string()),
        ("nouns", pa.list_(pa.string())),
        ("label", pa.int32()),  # -1 for none
    ]
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk file with its probed facts.

    Args:
        ref: path, size, frame count and frame size.
        video: name of the source video.
        start_s: seconds from the start of the video to time 0 of the chunk.
        fps: frames per second.
        codec: codec name as libavcodec says it.
        frame_times: float64 seconds of each frame after time 0 of the chunk, or None where frame i is shown at
            `i / fps`.
        last_s: seconds that the last frame is shown; 0 for `1 / fps`.
        pixel_aspect: width of a pixel divided by its height.
    """

    ref: ChunkRef
    video: str
    start_s: float
    fps: Fraction
    codec: str
    frame_times: np.ndarray | None = None
    last_s: float = 0.0
    pixel_aspect: float = 1.0

    @property
    def end_s(self) -> float:
        """Seconds from the start of the video to the end of the chunk's last frame."""
        if self.frame_times is not None:
            return self.start_s + float(self.frame_times[-1]) + (self.last_s or float(1 / self.fps))
        return self.start_s + float(self.ref.num_frames / self.fps)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: a time span of a video and what is said of it.

    Args:
        first_chunk: row of the first chunk the span touches.
        num_chunks: how many consecutive chunk rows it touches.
        start_s: start in seconds of the video.
        end_s: end in seconds of the video.
        texts: its narrations.
        tokens: token ids of each text, start and end markers included, not padded.
        verb: verb class, or empty.
        nouns: noun classes.
        label: class index, or -1.

    Raises:
        ValueError: when texts and tokens differ in number.
    """

    first_chunk: int
    num_chunks: int
    start_s: float
    end_s: float
    texts: tuple[str, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
    verb: str = ""
    nouns: tuple[str, ...] = ()
    label: int = -1

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or len(self.texts) != len(self.tokens):
            raise ValueError(f"texts {self.texts!r} need one list of tokens each, got {len(self.tokens)}")

    @property
    def text(self) -> str:
        """The first narration, or an empty text."""
        return self.texts[0] if self.texts else ""


class ChunkColumns:
    """Views of one record batch of `chunks.arrow`."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.path, self.video, self.codec = (strings(batch[name]) for name in ("path", "video", "codec"))
        self.start_s, self.size_bytes = numbers(batch["start_s"]), numbers(batch["size_bytes"])
        self.fps_num, self.fps_den = numbers(batch["fps_num"]), numbers(batch["fps_den"])
        self.num_frames = numbers(batch["num_frames"])
        self.width, self.height = numbers(batch["width"]), numbers(batch["height"])
        self.index_offset, self.index_bytes = numbers(batch["index_offset"]), numbers(batch["index_bytes"])
        self.last_s, self.pixel_aspect = (_later_numbers(batch, name) for name in _LATER_COLUMNS)
        self._times = batch["frame_times"]
        self._has_times = self._times.null_count < len(self._times)

    def frame_times(self, row: int) -> np.ndarray | None:
        """Return the seconds of a chunk's frames, float64; None where frame i is shown at `i / fps`."""
        if not self._has_times or not self._times[row].is_valid:
            return None
        return self._times[row].values.to_numpy()


def _later_numbers(batch: pa.RecordBatch, name: str) -> memoryview:
    if batch.schema.get_field_index(name) >= 0:
        return numbers(batch[name])
    return numbers(pa.array(np.full(len(batch), _LATER_COLUMNS[name])))


class SampleColumns:
    """Views of one record batch of `samples.arrow`."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.first_chunk, self.num_chunks = numbers(batch["first_chunk"]), numbers(batch["num_chunks"])
        self.start_s, self.end_s = numbers(batch["start_s"]), numbers(batch["end_s"])
        self.texts: Lists[Strings] = lists(batch["texts"], strings)
        self.tokens: Lists[Lists[memoryview]] = lists(batch["tokens"], lambda inner: lists(inner, numbers))
        self.verb, self.label = strings(batch["verb"]), numbers(batch["label"])
        self.nouns: Lists[Strings] = lists(batch["nouns"], strings)

    def token_ids(self, item: int) -> tuple[int, ...]:
        """Return the token ids of the text that is the batch's `item`-th."""
        inner = self.tokens.values
        return tuple(inner.values[inner.offsets[item] : inner.offsets[item + 1]])


def chunk_values(chunks: list[Chunk], root: str) -> dict[str, list[Any]]:
    """Return the columns of some chunk rows.

    Args:
        chunks: the rows.
        root: folder that paths are stored relative to.
    """
    refs = [chunk.ref for chunk in chunks]
    values: dict[str, list[Any]] = {
        "path": [os.path.relpath(ref.path, root) for ref in refs],
        "fps_num": [chunk.fps.numerator for chunk in chunks],
        "fps_den": [chunk.fps.denominator for chunk in chunks],
        "index_offset": [ref.index.offset if ref.index else 0 for ref in refs],
        "index_bytes": [ref.index.num_bytes if ref.index else 0 for ref in refs],
    }
    for name in ("num_frames", "width", "height", "size_bytes"):
        values[name] = [getattr(ref, name) for ref in refs]
    for name in ("video", "start_s", "codec", "frame_times", *_LATER_COLUMNS):
        values[name] = [getattr(chunk, name) for chunk in chunks]
    return values


def sample_values(samples: list[Sample], num_classes: int) -> dict[str, list[Any]]:
    """Return the columns of some clip rows.

    Args:
        samples: the rows.
        num_classes: what labels must stay below.

    Raises:
        ValueError: when a label is no class.
    """
    for sample in samples:
        if not -1 <= sample.label < num_classes:
            raise ValueError(f"label {sample.label} is none of the {num_classes} classes")
    return {name: [getattr(sample, name) for sample in samples] for name in SAMPLE_SCHEMA.names}
