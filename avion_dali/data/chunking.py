"""Cut videos into chunks: short, small, quickly decodable files of equal length.

Layout: `output/<video name>/<start second>.mp4`, where the video name keeps its ending and may have folders
(`P01/P01_01.MP4/15.mp4`). Beside the chunks, `chunks.json` states what they were made from and how; a chunk
exists under its name only when it was read back whole, so an interrupted run is continued by running again.

One process works on one video; this module is imported there, so nothing heavy is imported on top.
"""

from __future__ import annotations

import json
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import groupby
from pathlib import Path

from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avion_dali.child_process import SafeSpawn, die_with_parent
from avion_dali.contracts import DecodeError, UserError
from avion_dali.cores import available_cores
from avion_dali.data.encoding import PictureFilter, write_chunk
from avion_dali.data.probe import MAX_MISSING_SECONDS, ChunkFacts, open_video, probe_chunk
from avion_dali.data.profiles import PROFILES, ProfileName
from avion_dali.files import PARTIAL_PATTERN, whole_or_absent

SIDECAR = "chunks.json"


@dataclass(frozen=True)
class ChunkSettings:
    """How videos are cut.

    Args:
        profile: a row of `avion_dali/data/profiles.py`.
        chunk_seconds: length of a chunk; the last one of a video may be shorter.
        short_side: short side of the pictures in pixels, a multiple of 16; videos that are displayed smaller
            are not enlarged.

    Raises:
        UserError: when a value is not allowed.
    """

    profile: ProfileName = "balanced"
    chunk_seconds: int = 15
    short_side: int = 288

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise UserError(f"chunk profile {self.profile!r} is unknown; choose one of {', '.join(PROFILES)}")
        if self.chunk_seconds < 1:
            raise UserError(f"chunk_seconds = {self.chunk_seconds!r} must be at least 1")
        if self.short_side < 16 or self.short_side % 16:
            raise UserError(f"short_side = {self.short_side!r} must be a positive multiple of 16")


@dataclass(frozen=True)
class VideoReport:
    """What became of one video.

    Args:
        video: the source file.
        folder: where its chunks are.
        made: chunks encoded now.
        kept: chunks that were there already.
        failed: why the video is incomplete; empty when it is complete.
    """

    video: str
    folder: str
    made: int = 0
    kept: int = 0
    failed: str = ""


@dataclass(frozen=True)
class ChunkReport:
    """What became of all videos, in the order given."""

    videos: tuple[VideoReport, ...]

    @property
    def made(self) -> int:
        """Chunks encoded now."""
        return sum(video.made for video in self.videos)

    @property
    def kept(self) -> int:
        """Chunks that were there already."""
        return sum(video.kept for video in self.videos)

    @property
    def failed(self) -> tuple[VideoReport, ...]:
        """The incomplete videos."""
        return tuple(video for video in self.videos if video.failed)


@dataclass(frozen=True)
class ChunkPlan:
    """Borders of a video's chunks on its constant-rate frame grid.

    Args:
        fps: frames per second of the chunks.
        total: frames of the whole video at that rate.
        chunk_seconds: length of a chunk.
    """

    fps: Fraction
    total: int
    chunk_seconds: int
    borders: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        borders = [0]
        while borders[-1] < self.total:
            borders.append(min(round(len(borders) * self.chunk_seconds * self.fps), self.total))
        object.__setattr__(self, "borders", tuple(borders))

    @property
    def frames(self) -> dict[int, int]:
        """Frames of each chunk by its start second."""
        sizes = (after - before for before, after in zip(self.borders, self.borders[1:], strict=False))
        return {k * self.chunk_seconds: size for k, size in enumerate(sizes)}


def plan_chunks(facts: ChunkFacts, *, chunk_seconds: int) -> ChunkPlan:
    """Lay a video's frames on a constant-rate grid and cut it.

    Chunk k holds the grid frames [round(k L fps), round((k + 1) L fps)), so that borders do not drift where
    the rate is no whole number. A variable-rate video gets the whole rate nearest to its average; frames are
    placed by their time, so that does not drift either.

    Args:
        facts: of the source video.
        chunk_seconds: length L of a chunk.

    Returns:
        The plan.
    """
    if facts.frame_times is None:
        return ChunkPlan(facts.fps, round(facts.start_s * facts.fps) + facts.num_frames, chunk_seconds)
    fps = Fraction(max(round(facts.fps), 1))
    last_s = facts.start_s + float(facts.frame_times[-1])
    return ChunkPlan(fps, round(last_s * fps) + 1, chunk_seconds)


def chunk_video(video: Path, folder: Path, settings: ChunkSettings) -> VideoReport:
    """Make the missing chunks of one video, in one decoding pass.

    Only one run may work on a folder at a time. A continued video is decoded from its beginning, but only
    missing chunks are scaled and encoded.

    Args:
        video: source file.
        folder: where its chunks go; made when missing.
        settings: how to cut.

    Returns:
        What was made; a video that cannot be read to its end is reported as failed, its finished chunks stay.

    Raises:
        UserError: when the folder holds chunks of other settings, of another file, or of unknown origin.
    """
    made = 0
    kept: set[int] = set()
    try:
        if not stat.S_ISREG(os.stat(video).st_mode):
            return VideoReport(str(video), str(folder), failed="is not a regular file")
        frames = read_sidecar(video, folder, settings)
        if frames is not None:
            kept = _finished(folder, frames)
            if len(kept) == len(frames):
                return VideoReport(str(video), str(folder), kept=len(kept))
        facts = probe_chunk(video)
        plan = plan_chunks(facts, chunk_seconds=settings.chunk_seconds)
        _prepare_folder(video, folder, settings, plan)
        for _ in _make_chunks(facts, folder, settings, plan=plan):
            made += 1
    except (DecodeError, OSError, ValueError) as error:
        return VideoReport(str(video), str(folder), made, len(kept), failed=str(error) or type(error).__name__)
    return VideoReport(str(video), str(folder), made, len(kept))


def read_sidecar(video: Path, folder: Path, settings: ChunkSettings) -> dict[int, int] | None:
    """Frames of each chunk by start second, as `chunks.json` of an earlier run planned them.

    Args:
        video: source file.
        folder: where its chunks are.
        settings: how to cut now.

    Returns:
        The plan, or None when there is no such file.

    Raises:
        UserError: when the folder was made with other settings, from another file, or by something else.
    """
    path = folder / SIDECAR
    if not path.is_file():
        if any(folder.glob("*.mp4")):
            raise UserError(
                f"{folder} holds chunks but no {SIDECAR}: they were not made by this command; "
                "choose another output folder or move them away"
            )
        return None
    try:
        sidecar = json.loads(path.read_text())
        frames = {int(start): int(count) for start, count in sidecar["chunks"].items()}
        old = (sidecar["settings"], sidecar["source_bytes"])
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged; delete {folder} to make its chunks anew") from error
    new = _recorded(settings)
    if old[0] != new:
        raise UserError(
            f"{folder} was made with {old[0]}, not {new}; delete it or choose another output folder"
        )
    if old[1] != video.stat().st_size:
        raise UserError(
            f"{folder} was made from a file of {old[1]} bytes, but {video} has {video.stat().st_size}; "
            "delete it to make its chunks anew"
        )
    return frames


def _recorded(settings: ChunkSettings) -> dict[str, object]:
    """Settings as the sidecar states them: with the encoder's own, so that a changed profile is noticed."""
    return {**asdict(settings), "encoder": asdict(PROFILES[settings.profile])}


def _finished(folder: Path, frames: dict[int, int]) -> set[int]:
    return {start for start in frames if (folder / f"{start}.mp4").is_file()}


def _prepare_folder(video: Path, folder: Path, settings: ChunkSettings, plan: ChunkPlan) -> None:
    """Clear what a killed run left and write the sidecar, before the first chunk exists."""
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(PARTIAL_PATTERN):
        partial.unlink()
    sidecar = {
        "settings": _recorded(settings),
        "source": video.name,
        "source_bytes": video.stat().st_size,
        "fps": str(plan.fps),
        "chunks": plan.frames,
    }
    with whole_or_absent(folder / SIDECAR) as partial:
        partial.write_text(json.dumps(sidecar))


def _make_chunks(facts: ChunkFacts, folder: Path, settings: ChunkSettings, *, plan: ChunkPlan) -> Iterator[int]:
    """Encode the missing chunks of a video; yields the start second of each when it is finished."""
    starts = list(plan.frames)
    missing = set(starts) - _finished(folder, plan.frames)
    with open_video(facts.path, decoder="chunker") as (container, stream):
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        picture_of = PictureFilter(aspect, short_side=settings.short_side)
        slots = _fill_grid(container, stream, facts, plan=plan)
        # Slots of chunks that exist are decoded and passed over by groupby.
        for chunk, own_slots in groupby(slots, key=lambda slot: bisect_right(plan.borders, slot[0]) - 1):
            if starts[chunk] not in missing:
                continue
            path = folder / f"{starts[chunk]}.mp4"
            write_chunk(
                path,
                (picture_of(frame) for _, frame in own_slots),
                profile=PROFILES[settings.profile],
                fps=plan.fps,
            )
            yield starts[chunk]


def _fill_grid(
    container: InputContainer, stream: VideoStream, facts: ChunkFacts, *, plan: ChunkPlan
) -> Iterator[tuple[int, VideoFrame]]:
    """Decode a video and yield (grid index, frame): each frame from its own time up to the next one's."""
    filled = 0
    previous: VideoFrame | None = None
    for frame, seconds in _timed_frames(container, stream, facts):
        begin = min(round(seconds * plan.fps), plan.total)
        if previous is not None:
            yield from ((index, previous) for index in range(filled, begin))
            filled = max(filled, begin)
        previous = frame
    missing = float((plan.total - filled - 1) / plan.fps)
    if previous is None or missing > MAX_MISSING_SECONDS:
        cause = f"decoding ends {missing:.1f} s before the {float(plan.total / plan.fps):.1f} s it should have"
        raise DecodeError(facts.path, (), decoder="chunker", kind="corrupt", cause=cause)
    yield from ((index, previous) for index in range(filled, plan.total))


def _timed_frames(
    container: InputContainer, stream: VideoStream, facts: ChunkFacts
) -> Iterator[tuple[VideoFrame, Fraction]]:
    """Decoded frames with their seconds on a player's clock; the first stands in for what is before it."""
    start_s = Fraction(facts.start_s)
    # AVI stores no presentation times: with B-frames, the decoder's guesses are out of order.
    by_number = container.format.name == "avi"
    origin: int | None = None
    for number, frame in enumerate(container.decode(stream)):
        if by_number and facts.frame_times is not None:
            yield frame, Fraction(facts.frame_times[min(number, facts.num_frames - 1)])
        elif by_number:
            yield frame, number / facts.fps
        elif frame.pts is not None and frame.time_base is not None:
            origin = frame.pts if origin is None else origin
            yield frame, start_s + (frame.pts - origin) * frame.time_base


def chunk_folders(videos: Sequence[Path], output: Path, *, root: Path | None = None) -> list[Path]:
    """Folder of each video's chunks.

    Args:
        videos: source files.
        output: folder of all chunks.
        root: folder that the videos lie in; their folders below it are kept. None uses the file names alone.

    Returns:
        One folder a video.

    Raises:
        UserError: when two videos would share a folder, or a video is outside of `root`.
    """
    folders: dict[Path, Path] = {}
    for video in videos:
        if root is not None and not video.absolute().is_relative_to(root.absolute()):
            raise UserError(f"{video} is not inside --root {root}; give the folder that holds all videos")
        name = video.name if root is None else video.absolute().relative_to(root.absolute())
        if output / name in folders:
            raise UserError(
                f"{folders[output / name]} and {video} would both become {output / name}; "
                "give --root, the folder that holds all videos, to keep their folders apart"
            )
        folders[output / name] = video
    return list(folders)


def chunk_videos(
    videos: Sequence[Path],
    output: Path,
    *,
    settings: ChunkSettings,
    root: Path | None = None,
    jobs: int = 0,
    progress: bool = True,
) -> ChunkReport:
    """Cut videos into chunks, several videos at a time; a video that fails does not stop the others.

    Args:
        videos: source files.
        output: folder of all chunks; may hold those of an earlier run with the same settings.
        settings: how to cut.
        root: see `chunk_folders`.
        jobs: videos worked on at a time, one process and one thread each; 0 for one a core.
        progress: show a bar of finished videos.

    Returns:
        What became of each video.

    Raises:
        UserError: before any work, when names collide or a folder was made differently.
    """
    # Both are for this process only; the workers import this module and should stay light.
    from pebble import ProcessPool
    from tqdm import tqdm

    folders = chunk_folders(videos, output, root=root)
    for video, folder in zip(videos, folders, strict=True):
        if video.is_file():
            read_sidecar(video, folder, settings)
    workers = max(1, min(jobs or available_cores(), len(videos)))
    with ProcessPool(
        max_workers=workers, initializer=die_with_parent, initargs=(os.getpid(),), context=SafeSpawn()
    ) as pool:
        try:
            futures = [
                pool.schedule(chunk_video, args=(video, folder, settings))
                for video, folder in zip(videos, folders, strict=True)
            ]
            for _ in tqdm(as_completed(futures), total=len(futures), unit="video", disable=not progress):
                pass
        except BaseException:
            pool.stop()
            raise
    reports = []
    for video, folder, future in zip(videos, folders, futures, strict=True):
        try:
            reports.append(future.result())
        except Exception as error:  # worker boundary: whatever ended the worker is that video's failure
            cause = f"{type(error).__name__}: {error}"
            reports.append(VideoReport(str(video), str(folder), failed=cause))
    return ChunkReport(tuple(reports))
