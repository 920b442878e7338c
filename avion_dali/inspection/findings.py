"""Kinds of findings of a check, with their severity and advice."""

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
        severity: an error makes clips unreadable; a warning reduces speed or fidelity, or requires a decision;
            a note has no effect.
        advice: what to do about it.
    """

    severity: Severity
    advice: str


_REMAKE = "delete the file, run `avion-dali chunk` again and rebuild the manifest"
KINDS: dict[str, Kind] = {
    "missing": Kind("error", "restore the file, or check the disk"),
    "truncated": Kind("error", _REMAKE),
    "undecodable": Kind("error", _REMAKE),
    "checksum": Kind("error", "the file is damaged or was overwritten: restore it, or " + _REMAKE),
    "changed": Kind("error", "rebuild the manifest"),
    "wrong-count": Kind("error", "rebuild the manifest"),
    "wrong-order": Kind("error", "its header or its pictures are damaged: " + _REMAKE),
    "decoders-differ": Kind("error", "its header or its pictures are damaged: " + _REMAKE),
    "index": Kind("error", "rebuild the manifest"),
    "crashed": Kind("error", "check the memory; if it crashes again, " + _REMAKE),
    "timeout": Kind("error", "check the disk or network drive; long files may need a longer --timeout"),
    "color": Kind("warning", "chunk with `avion-dali chunk`, or train with --decoder cpu-fused"),
    "chunk-names": Kind(
        "warning", "rename the files, or run `avion-dali manifest` with --chunk-names and --chunk-seconds"
    ),
    "pixel-aspect": Kind("warning", "clips are corrected but have fewer pixels: chunk with `avion-dali chunk`"),
    "interlaced": Kind("warning", "moving edges look like combs: deinterlace it before chunking"),
    "hdr": Kind("warning", "its colors are decoded too pale: convert it to standard range before chunking"),
    "wide-gamut": Kind(
        "warning", "its colors are decoded too pale: convert it to BT.709 primaries before chunking"
    ),
    "joined": Kind("warning", "manifests leave it out: chunk with `avion-dali chunk`, which cuts all of them"),
    "rotation": Kind("warning", "decoders do not rotate it: chunk with `avion-dali chunk`"),
    "nvdec-size": Kind("warning", "the GPU decoder restarts for every clip: chunk with `avion-dali chunk`"),
    "many-sizes": Kind("warning", "the GPU decoder is kept for one size at a time: chunk to fewer sizes"),
    "long-gop": Kind("warning", "clips decode many unused frames: chunk with another --profile"),
    "untagged": Kind("note", "nothing if it is limited-range BT.601, which all decoders assume"),
    "variable-rate": Kind("note", "nothing: frames are found by their times"),
    "late-picture": Kind("note", "nothing: earlier times use its first picture"),
    "open-gop": Kind("note", "nothing: the frames they need are decoded too"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding about one file, or about a whole folder.

    Args:
        kind: one of `KINDS`.
        detail: description.
        frame_id: the first affected frame, or -1.
    """

    kind: str
    detail: str
    frame_id: int = -1

    @property
    def is_error(self) -> bool:
        """Whether it makes clips unreadable."""
        return KINDS[self.kind].severity == "error"


@dataclass(frozen=True, slots=True)
class Target:
    """A file to check, with its known facts.

    Args:
        path: the file.
        deep: decode all of it.
        ref: its reference in the manifest; None without a manifest.
        fps: frames per second according to the manifest.
        is_cfr: whether the frame rate is constant according to the manifest.
        video: name of its video.
        start_s: start in seconds of the video, from the file's name.
        late_s: seconds before its first picture according to the manifest.
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
    """Result of checking one file.

    Args:
        path: the file.
        stamp: size in bytes and modification time in nanoseconds; (-1, -1) if it does not exist.
        deep: whether the check includes decoding.
        frame_size: width and height in pixels; (0, 0) if unknown.
        findings: empty if nothing was found.
        video: name of its video.
        span: start and end in seconds of the video, from its name and length; None if unknown.
    """

    path: str
    stamp: tuple[int, int]
    deep: bool
    frame_size: tuple[int, int] = (0, 0)
    findings: tuple[Finding, ...] = ()
    video: str = ""
    span: tuple[float, float] | None = None
