"""Rows of a manifest's two tables, as objects and as views of Arrow columns."""

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
        ("start_s", pa.float64()),  # start of the chunk in its video
        ("fps_num", pa.int32()),
        ("fps_den", pa.int32()),
        ("num_frames", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("size_bytes", pa.int64()),
        ("codec", pa.string()),
        ("frame_times", pa.list_(pa.float64())),  # null if frame i is shown at i / fps
        ("index_offset", pa.int64()),  # position of its record in packets.bin
        ("index_bytes", pa.int32()),  # 0 for a chunk without index
        ("last_s", pa.float64()),  # seconds for which the last frame is shown
        ("pixel_aspect", pa.float64()),  # width of a pixel divided by its height
    ]
)
# Columns that manifests of earlier builds do not have, and their default values.
_LATER_COLUMNS = {"last_s": 0.0, "pixel_aspect": 1.0}
SAMPLE_SCHEMA = pa.schema(
    [
        ("first_chunk", pa.int32()),
        ("num_chunks", pa.int16()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("texts", pa.list_(pa.string())),
        ("tokens", pa.list_(pa.list_(pa.uint16()))),  # one list per text
        ("verb", pa.string()),
        ("nouns", pa.list_(pa.string())),
        ("label", pa.int32()),  # -1 for no label
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
        codec: FFmpeg's codec name.
        frame_times: float64 seconds of each frame after time 0 of the chunk, or None if frame i is shown at
            `i / fps`.
        last_s: seconds for which the last frame is shown; 0 for `1 / fps`.
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
    """One row: a time span of a video with its texts and classes.

    Args:
        first_chunk: row of the first chunk of the span.
        num_chunks: number of consecutive chunk rows of the span.
        start_s: start in seconds of the video.
        end_s: end in seconds of the video.
        texts: its texts.
        tokens: token ids of each text, including start and end markers, without padding.
        verb: verb class, or empty.
        nouns: noun classes.
        label: class index, or -1.

    Raises:
        ValueError: when the numbers of texts and token lists differ.
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
        """The first text, or an empty string."""
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
        """Return the times of a chunk's frames in seconds, float64; None if frame i is shown at `i / fps`."""
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
        """Return the token ids of the text with index `item` in the batch."""
        inner = self.tokens.values
        return tuple(inner.values[inner.offsets[item] : inner.offsets[item + 1]])


def chunk_values(chunks: list[Chunk], root: str) -> dict[str, list[Any]]:
    """Return the columns of some chunk rows.

    Args:
        chunks: the rows.
        root: folder to which stored paths are relative.
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
    """Return the columns of some samples.

    Args:
        samples: the samples.
        num_classes: exclusive upper limit of labels.

    Raises:
        ValueError: when a label is not a class index.
    """
    for sample in samples:
        if not -1 <= sample.label < num_classes:
            raise ValueError(f"label {sample.label} is none of the {num_classes} classes")
    return {name: [getattr(sample, name) for sample in samples] for name in SAMPLE_SCHEMA.names}
