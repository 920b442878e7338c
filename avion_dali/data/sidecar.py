"""The file `chunks.json`: source and settings of a video's chunks, and which of them are lost.

This module runs in chunking workers, so it imports nothing that is slow to load.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from avion_dali.contracts import UserError
from avion_dali.files import atomic_write_text

SIDECAR = "chunks.json"


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of a video due to damage.

    Args:
        spans: (from, to) in seconds of the video that cannot be decoded.
        chunks: start seconds of the chunks that were not created for this reason.
    """

    spans: tuple[tuple[float, float], ...] = ()
    chunks: tuple[int, ...] = ()

    def __str__(self) -> str:
        seconds = ", ".join(f"{start:.2f}-{end:.2f} s" for start, end in self.spans)
        return f"damaged at {seconds}; chunks not made: {', '.join(map(str, self.chunks)) or 'none'}"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The contents of a `chunks.json`.

    Args:
        settings: how the video was cut, as recorded by the writer.
        source: file name of the video.
        source_bytes: size of the video file.
        fps: frames per second of the chunks.
        chunks: number of frames of each chunk by its start second.
        losses: losses due to damage.
    """

    settings: dict[str, Any]
    source: str
    source_bytes: int
    fps: Fraction
    chunks: dict[int, int]
    losses: Losses = Losses()

    def write(self, folder: Path) -> None:
        """Write the file atomically.

        Args:
            folder: folder of the chunks.
        """
        values: dict[str, Any] = {
            "settings": self.settings,
            "source": os.fsencode(self.source).decode(errors="backslashreplace"),
            "source_bytes": self.source_bytes,
            "fps": str(self.fps),
            "chunks": self.chunks,
        }
        if self.losses.spans:
            values["lost_seconds"] = [[round(second, 3) for second in span] for span in self.losses.spans]
            values["lost_chunks"] = list(self.losses.chunks)
        atomic_write_text(folder / SIDECAR, json.dumps(values))


def read_sidecar(folder: Path) -> Sidecar | None:
    """Read the `chunks.json` of a folder.

    Args:
        folder: folder of the chunks.

    Returns:
        The contents, or None if the file does not exist.

    Raises:
        UserError: when the file is damaged.
    """
    path = folder / SIDECAR
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        spans = tuple((float(start), float(end)) for start, end in values.get("lost_seconds", ()))
        return Sidecar(
            settings=values["settings"],
            source=str(values.get("source", "")),
            source_bytes=values["source_bytes"],
            fps=Fraction(values.get("fps", "0")),
            chunks={int(start): int(count) for start, count in values["chunks"].items()},
            losses=Losses(spans, tuple(map(int, values.get("lost_chunks", ())))),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged; delete {folder} to make its chunks again") from error
