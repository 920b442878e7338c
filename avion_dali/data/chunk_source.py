"""Reads a source video as the pictures of its chunks, each at its time, and records lost ranges.

This module runs in chunking workers, so it imports only numpy and PyAV.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from av.video.frame import VideoFrame

from avion_dali.contracts import DecodeError
from avion_dali.data.chunk_plan import ChunkPlan
from avion_dali.data.declared import MAX_MISSING_SECONDS
from avion_dali.data.joined import RecordingsReader
from avion_dali.data.probe import ChunkFacts


@dataclass(frozen=True, slots=True)
class Slot:
    """One position of the constant-rate grid.

    Args:
        index: index of the position.
        frame: the picture to show there; None if it is lost.
        due: the position that corresponds to the picture's own time.
    """

    index: int
    frame: VideoFrame | None
    due: int = 0


class SourceReader:
    """Decodes a source video onto a grid.

    Args:
        reader: decodes the file.
        facts: facts of the file.
        plan: the grid.
    """

    def __init__(self, reader: RecordingsReader, *, facts: ChunkFacts, plan: ChunkPlan) -> None:
        self.lost: list[tuple[float, float]] = []  # from and to, in seconds of a player's clock
        self.cut_short = ""  # description of a premature end of the file
        self._reader = reader
        self._facts, self._plan = facts, plan
        self._densest = facts.densest_fps or facts.fps
        self._shift = Fraction(facts.start_s) - facts.first_s

    def slots(self) -> Iterator[Slot]:
        """Yield the positions of the grid in order, each with the picture that is shown there.

        Raises:
            DecodeError: when no picture is undamaged.
        """
        plan = self._plan
        filled, previous, due = 0, None, 0
        intact_until = shown_at = Fraction(0)
        for delivered in self._reader:
            seconds = self._seconds(delivered.frame, delivered.number)
            # Near damage, a decoder may deliver a picture after others that are shown later.
            if not delivered.is_whole or (previous is not None and seconds < shown_at):
                continue
            begin = min(round(seconds * plan.fps), plan.total)
            lost_from = begin
            # A stream that begins inside a group of pictures is not damaged; it only starts late.
            if delivered.after_loss and not (previous is None and self._reader.begins_inside):
                lost_from = self._note_loss(intact_until, seconds, filled=filled)
            shown = previous if previous is not None or lost_from < begin else delivered.frame
            for index in range(filled, max(begin, filled)):
                yield Slot(index, None if index >= lost_from else shown, due)
            filled = max(filled, begin)
            previous, due, shown_at = delivered.frame, begin, seconds
            intact_until = seconds + 1 / self._densest
        yield from self._tail(filled, previous, due=due, intact_until=intact_until)

    def _note_loss(self, intact_until: Fraction, whole_from: Fraction, *, filled: int) -> int:
        """Record a loss between two undamaged pictures; return the first grid position that is lost."""
        start = min(intact_until, whole_from)
        self.lost.append((float(start), float(whole_from)))
        return max(round(start * self._plan.fps), filled)

    def _tail(
        self, filled: int, previous: VideoFrame | None, *, due: int, intact_until: Fraction
    ) -> Iterator[Slot]:
        plan = self._plan
        missing = float((plan.total - filled - 1) / plan.fps)
        if previous is None:
            raise self._corrupt("none of its pictures can be decoded without damage")
        lost_from = plan.total
        if missing > max(MAX_MISSING_SECONDS, self._facts.last_s + 0.5):
            length = float(plan.total / plan.fps)
            self.cut_short = f"decoding ends {missing:.1f} s before the expected {length:.1f} s"
        if self._reader.ends_broken or self.cut_short:
            lost_from = self._note_loss(intact_until, max(plan.total / plan.fps, intact_until), filled=filled)
        for index in range(filled, plan.total):
            yield Slot(index, None if index >= lost_from else previous, due)

    def _seconds(self, frame: VideoFrame, number: int) -> Fraction:
        """Return the time of a picture in seconds of a player's clock."""
        facts = self._facts
        if not facts.is_counted and frame.pts is not None:
            return frame.pts * self._reader.tick + self._shift
        number = min(number, facts.num_frames - 1)
        if facts.frame_times is not None:
            return Fraction(facts.start_s + float(facts.frame_times[number]))
        return Fraction(facts.start_s) + number / facts.fps

    def _corrupt(self, cause: str) -> DecodeError:
        return DecodeError(self._facts.path, (), decoder="chunker", kind="corrupt", cause=cause)
