"""The values that the parts of the library exchange: clip requests, batches and errors.

A `ClipRequest` fixes every random choice of one clip before anything is read; a decoder turns it
into frames; a loader collects frames into a `ClipBatch`. Shapes and ranges are checked once, when
an object is created. Decode workers import this module, so it must import neither torch nor pyarrow.

Axis letters in the names of arrays and tensors: B clips, V views of a clip, T frames, H W pixels, C channels,
N tokens, D width, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

FailureKind = Literal["missing", "changed", "corrupt", "timeout", "worker-died"]


class UserError(Exception):
    """An error that the user can fix. Its message names the cause and the remedy; no traceback is shown."""


class DecodeError(Exception):
    """A clip could not be read.

    Args:
        path: the chunk file that failed.
        frame_ids: the frames that were requested from it.
        decoder: name of the decoder.
        kind: class of failure, see `FailureKind`.
        cause: what went wrong, in words.
    """

    def __init__(
        self, path: str, frame_ids: tuple[int, ...], *, decoder: str, kind: FailureKind, cause: str
    ) -> None:
        # All arguments go to Exception so that the error survives pickling between processes.
        super().__init__(path, frame_ids, decoder, kind, cause)
        self.path, self.frame_ids, self.decoder, self.kind, self.cause = path, frame_ids, decoder, kind, cause

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_decode_error, self.args

    def __str__(self) -> str:
        frames = f", frames {list(self.frame_ids)}" if self.frame_ids else ""
        return f"{self.path}: {self.kind}: {self.cause} (decoder {self.decoder}{frames})"


def _rebuild_decode_error(
    path: str, frame_ids: tuple[int, ...], decoder: str, kind: FailureKind, cause: str
) -> DecodeError:
    return DecodeError(path, frame_ids, decoder=decoder, kind=kind, cause=cause)


@dataclass(frozen=True, slots=True)
class CropWindow:
    """A rectangle of source pixels on the even grid.

    All four numbers are even: in 4:2:0 video an odd offset shifts chroma against luma by half a sample,
    and FFmpeg and DALI shift it differently.

    Args:
        x: left edge in pixels, even, >= 0.
        y: top edge in pixels, even, >= 0.
        width: in pixels, even, > 0.
        height: in pixels, even, > 0.

    Raises:
        ValueError: when a number is odd or out of range.
    """

    x: int
    y: int
    width: int
    height: int

    def __post_init__(self) -> None:
        numbers = (self.x, self.y, self.width, self.height)
        if any(n % 2 for n in numbers) or min(self.x, self.y) < 0 or min(self.width, self.height) <= 0:
            raise ValueError(f"crop window {numbers} must be even, inside the frame and not empty")


@dataclass(frozen=True, slots=True)
class PacketIndexRef:
    """Where a chunk's packet index is stored.

    Args:
        path: absolute path of the index file, `packets.bin` of a manifest.
        offset: first byte of the chunk's record.
        num_bytes: length of the record.
    """

    path: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """What a worker needs to read a chunk file and to detect that it has changed.

    Args:
        path: absolute path of the file.
        size_bytes: file size when the manifest was built.
        num_frames: frames in presentation order when the manifest was built.
        width: display width in pixels.
        height: display height in pixels.
        index: its packet index; without one (None), packets are found by opening the container.
    """

    path: str
    size_bytes: int
    num_frames: int
    width: int
    height: int
    index: PacketIndexRef | None = None


@dataclass(frozen=True, slots=True)
class ClipPart:
    """Frames requested from one chunk.

    Args:
        chunk: the file.
        frame_ids: presentation-order indices, strictly increasing, each in [0, chunk.num_frames).

    Raises:
        ValueError: when the ids are empty, unsorted, repeated or out of range.
    """

    chunk: ChunkRef
    frame_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        ids = self.frame_ids
        if not ids or any(a >= b for a, b in zip(ids, ids[1:], strict=False)):
            raise ValueError(f"{self.chunk.path}: frame ids {ids} must be strictly increasing and not empty")
        if ids[0] < 0 or ids[-1] >= self.chunk.num_frames:
            raise ValueError(f"{self.chunk.path}: frame ids {ids} outside [0, {self.chunk.num_frames})")


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """One clip with every random choice made: a pure function of (seed, epoch, sample id).

    Args:
        sample_id: row of the manifest.
        epoch: the epoch it is drawn for, >= 0.
        parts: the chunks to read, in order; several if the clip crosses a chunk border.
        gather: length T; frame t of the clip is the `gather[t]`-th frame of all parts, so repeated
            frames are decoded once.
        windows: V crop windows, one per view; all views share one decode.
        flips: V booleans, whether a view is mirrored left to right.
        frame_size: side of the square output in pixels.
        tokens: text token ids, or empty.
        label: class index, or -1.
        caption_id: index of the caption that the tokens belong to, or -1.

    Raises:
        ValueError: when the fields contradict each other.
    """

    sample_id: int
    epoch: int
    parts: tuple[ClipPart, ...]
    gather: tuple[int, ...]
    windows: tuple[CropWindow, ...]
    flips: tuple[bool, ...]
    frame_size: int
    tokens: tuple[int, ...] = ()
    label: int = -1
    caption_id: int = -1

    def __post_init__(self) -> None:
        available = sum(len(part.frame_ids) for part in self.parts)
        if not self.gather or min(self.gather) < 0 or max(self.gather) >= available:
            raise ValueError(f"gather {self.gather} does not index the {available} frames of the parts")
        if not self.windows or len(self.windows) != len(self.flips):
            raise ValueError(f"{len(self.windows)} windows need as many flips, got {len(self.flips)}")
        for part in self.parts:
            for w in self.windows:
                if w.x + w.width > part.chunk.width or w.y + w.height > part.chunk.height:
                    raise ValueError(f"{w} leaves {part.chunk.path} ({part.chunk.width}x{part.chunk.height})")

    @property
    def frames_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of the decoded clip: (V, T, H, W, C), uint8."""
        return (len(self.windows), len(self.gather), self.frame_size, self.frame_size, 3)


@dataclass(frozen=True, slots=True)
class ClipError:
    """A clip that could not be delivered, as written to `quarantine.jsonl`.

    Args:
        sample_id: row of the manifest that failed.
        epoch: the epoch it was drawn for.
        kind: class of failure.
        path: the chunk file.
        frame_ids: frames requested from it.
        cause: what went wrong, in words.
        substitute_id: the sample delivered in its place, or None if the row is marked invalid instead.
    """

    sample_id: int
    epoch: int
    kind: FailureKind
    path: str
    frame_ids: tuple[int, ...]
    cause: str
    substitute_id: int | None = None


@dataclass(slots=True)
class ClipBatch:
    """One micro-batch of one rank, ready for the model.

    Args:
        frames_BTHWC: uint8 tensor (B*V, T, H, W, 3), RGB, on the target device; the views of a clip are
            adjacent (row b*V + v).
        tokens_BL: int64 tensor (B, L) of text token ids, zero padded, or None; batches may differ in L.
        labels_B: int64 tensor (B,) of class indices, or None.
        sample_ids: int64 array (B,), the manifest row that each row holds; for a replaced clip, the row of
            the substitute.
        view_ids: int64 array (B*V,), 0..V-1 repeating.
        valid: bool array (B,); False for a row whose clip could not be read and was not replaced; its
            frames are zeros and must not be scored.
        epoch: the epoch the batch belongs to.
        errors: the clips that could not be read while this batch was filled.
        caption_ids: int64 array (B,), index of the caption that is each row's text, -1 where the text is
            not a caption; or None.
    """

    frames_BTHWC: torch.Tensor
    tokens_BL: torch.Tensor | None
    labels_B: torch.Tensor | None
    sample_ids: np.ndarray
    view_ids: np.ndarray
    valid: np.ndarray
    epoch: int = 0
    errors: tuple[ClipError, ...] = field(default=())
    caption_ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        rows, views = len(self.sample_ids), len(self.view_ids)
        frames = self.frames_BTHWC
        if frames.ndim != 5 or frames.shape[-1] != 3 or str(frames.dtype) != "torch.uint8":
            raise ValueError(
                f"frames must be uint8 (B*V, T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}"
            )
        if frames.shape[0] != views or (rows and views % rows) or len(self.valid) != rows:
            raise ValueError(f"{frames.shape[0]} clips, {views} views and {rows} samples do not fit")
        texts_and_classes = ("tokens_BL", "labels_B", "caption_ids")
        for name in texts_and_classes:
            values = getattr(self, name)
            if values is not None and values.shape[0] != rows:
                raise ValueError(f"{name} has {values.shape[0]} rows, the batch has {rows}")

    def __len__(self) -> int:
        return len(self.sample_ids)
