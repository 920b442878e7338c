"""The words of a check: what can be found, how bad it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from avion_dali.contracts import ChunkRef

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of findings.

    Args:
        severity: an error costs clips, a warning costs speed or fidelity, or needs a decision; a note costs
            nothing.
        advice: what to do.
    """

    severity: Severity
    advice: str


_REMAKE = "delete the file, run `avion-dali chunk` again and build the manifest again"
KINDS: dict[str, Kind] = {
    "missing": Kind("error", "restore the file, or check the disk"),
    "truncated": Kind("error", _REMAKE),
    "undecodable": Kind("error", _REMAKE),
    "checksum": Kind("error", "the file decayed or was written over: restore it, or " + _REMAKE),
    "changed": Kind("error", "build the manifest again"),
    "wrong-count": Kind("error", "build the manifest again"),
    "wrong-order": Kind("error", "its header or its pictures are damaged: " + _REMAKE),
    "index": Kind("error", "build the manifest again"),
    "crashed": Kind("error", "check the memory; if it crashes again, " + _REMAKE),
    "timeout": Kind("error", "check the disk or network drive; long files may need a longer --timeout"),
    "colour": Kind("warning", "chunk with `avion-dali chunk`, or train with --decoder cpu-fused"),
    "chunk-names": Kind(
        "warning", "rename the files, or give `avion-dali manifest` --chunk-names and --chunk-seconds"
    ),
    "pixel-aspect": Kind("warning", "clips are corrected, at fewer pixels: chunk with `avion-dali chunk`"),
    "interlaced": Kind("warning", "moving edges show combs: remove the interlacing before chunking"),
    "hdr": Kind("warning", "its colors come out pale: convert it to standard range before chunking"),
    "wide-gamut": Kind("warning", "its colors come out pale: convert it to BT.709 primaries before chunking"),
    "rotation": Kind("warning", "decoders do not turn it: chunk with `avion-dali chunk`"),
    "nvdec-size": Kind("warning", "the GPU decoder starts anew for every clip: chunk with `avion-dali chunk`"),
    "many-sizes": Kind("warning", "the GPU decoder is kept for one size at a time: chunk to fewer sizes"),
    "long-gop": Kind("warning", "clips decode many frames they do not keep: `avion-dali chunk` has --profile"),
    "untagged": Kind("note", "nothing if it is limited-range BT.601, which all decoders take it for"),
    "variable-rate": Kind("note", "nothing: frames are found by their times"),
    "late-picture": Kind("note", "nothing: until its first picture begins, that one stands in"),
    "open-gop": Kind("note", "nothing: the frames they need are decoded too"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one file, or about a whole folder.

    Args:
        kind: one of `KINDS`.
        detail: in words.
        frame_id: the first frame it concerns, or -1.
    """

    kind: str
    detail: str
    frame_id: int = -1

    @property
    def is_error(self) -> bool:
        """Whether it costs clips."""
        return KINDS[self.kind].severity == "error"


@dataclass(frozen=True, slots=True)
class Target:
    """A file to check, and what is known of it.

    Args:
        path: the file.
        deep: decode all of it.
        ref: its row of the manifest, or None.
        fps: frames per second by the manifest.
        is_cfr: whether the rate is constant by the manifest.
        video: name of its video.
        start_s: seconds from the start of the video, by its name.
        late_s: seconds before its first picture, by the manifest.
    """

    path: str
    deep: bool
    ref: ChunkRef | None = None
    fps: Fraction = Fraction(0)
    is_cfr: bool = True
    video: str = ""
    start_s: float = 0.0
    late_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FileReport:
    """What checking a file gave.

    Args:
        path: the file.
        stamp: size in bytes and modification time in nanoseconds; (-1, -1) when it is not there.
        deep: whether it was to be decoded.
        frame_size: width and height in pixels; (0, 0) when unknown.
        findings: empty when all is well.
        video: name of its video.
        span: start and end in seconds of the video, by its name and length; None when unknown.
    """

    path: str
    stamp: tuple[int, int]
    deep: bool
    frame_size: tuple[int, int] = (0, 0)
    findings: tuple[Finding, ...] = ()
    video: str = ""
    span: tuple[float, float] | None = None
