"""Cuts videos into chunks: small files of equal length that decode quickly.

Layout: `output/<video name>/<start second>.mp4`, where the video name includes its extension and may include
folders (`P01/P01_01.MP4/15.mp4`). Next to the chunks, `chunks.json` records their source and settings. A chunk
gets its final name only after it was read back and verified, so an interrupted run can simply be repeated.

Each process handles one video. The processes import this module, so it imports nothing that is slow to load.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from avion_dali.child_process import SafeSpawn, die_with_parent
from avion_dali.contracts import DecodeError, UserError
from avion_dali.cores import available_cores
from avion_dali.data.chunk_plan import ChunkPlan, describe_plan, plan_chunks
from avion_dali.data.chunk_source import Slot, SourceReader
from avion_dali.data.container_limits import ByteSpan
from avion_dali.data.encoding import ChunkWriter, PictureFilter, look_of
from avion_dali.data.joined import RecordingsReader, find_recordings, probe_recordings
from avion_dali.data.probe import ChunkFacts
from avion_dali.data.profiles import PROFILES, ProfileName
from avion_dali.data.sidecar import SIDECAR, Losses, Sidecar, read_sidecar
from avion_dali.files import PARTIAL_PATTERN


@dataclass(frozen=True)
class ChunkSettings:
    """Settings for cutting videos.

    Args:
        profile: name of a profile in `avion_dali/data/profiles.py`.
        chunk_seconds: length of a chunk in seconds; the last chunk of a video may be shorter.
        short_side: short side of the pictures in pixels, a multiple of 16; videos with a smaller display size
            are not enlarged.
        max_fps: upper limit of the frame rate; 0 for no limit.

    Raises:
        UserError: when a value is not allowed.
    """

    profile: ProfileName = "balanced"
    chunk_seconds: int = 15
    short_side: int = 288
    max_fps: int = 0

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise UserError(f"chunk profile {self.profile!r} is unknown; choose one of {', '.join(PROFILES)}")
        if self.chunk_seconds < 1:
            raise UserError(f"chunk_seconds = {self.chunk_seconds!r} must be at least 1")
        if self.short_side < 16 or self.short_side % 16:
            raise UserError(f"short_side = {self.short_side!r} must be a positive multiple of 16")
        if self.max_fps < 0:
            raise UserError(f"max_fps = {self.max_fps!r} must be at least 1, or 0 for no limit")


@dataclass(frozen=True)
class VideoReport:
    """Result of cutting one video.

    Args:
        video: the source file.
        folder: the folder of its chunks.
        made: number of chunks encoded in this run.
        kept: number of chunks that existed before.
        failed: why the video is incomplete; empty if it is complete.
        losses: what was lost to damage.
        notes: further messages for the user.
    """

    video: str
    folder: str
    made: int = 0
    kept: int = 0
    failed: str = ""
    losses: Losses = Losses()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChunkReport:
    """Results of all videos, in the given order."""

    videos: tuple[VideoReport, ...]

    @property
    def made(self) -> int:
        """Number of chunks encoded in this run."""
        return sum(video.made for video in self.videos)

    @property
    def kept(self) -> int:
        """Number of chunks that existed before."""
        return sum(video.kept for video in self.videos)

    @property
    def failed(self) -> tuple[VideoReport, ...]:
        """The incomplete videos."""
        return tuple(video for video in self.videos if video.failed)


def chunk_video(video: Path, folder: Path, settings: ChunkSettings) -> VideoReport:
    """Create the missing chunks of one video in one decoding pass.

    Only one run may use a folder at a time. An interrupted video is decoded from its beginning again, but only
    missing chunks are scaled and encoded. If a video is damaged, only the chunks without damage are created.

    Args:
        video: source file.
        folder: folder for its chunks; created if it does not exist.
        settings: how to cut.

    Returns:
        The result; a video that cannot be read completely is reported as failed, and its finished chunks are
        kept.

    Raises:
        UserError: when the folder contains chunks of other settings, of another file, or of unknown origin.
    """
    job = _Job(video, folder, settings)
    try:
        if not stat.S_ISREG(os.stat(video).st_mode):
            return job.report("is not a regular file")
        is_done = job.is_done(planned_frames(video, folder, settings=settings))
        spans: Sequence[ByteSpan] = find_recordings(video)
        unread = ""
        if not is_done or len(spans) > 1:
            facts, spans, unread = probe_recordings(video, spans)
            if not is_done:
                job.cut(facts, spans)
        lost = f"is {job.losses}" if job.losses.spans else ""
        return job.report("; ".join(filter(None, [lost, unread])))
    except (DecodeError, OSError, ValueError) as error:
        return job.report(str(error) or type(error).__name__)


@dataclass
class _Job:
    """Cuts one video."""

    video: Path
    folder: Path
    settings: ChunkSettings
    made: int = 0
    kept: set[int] = field(default_factory=set)
    losses: Losses = Losses()
    notes: list[str] = field(default_factory=list)

    def report(self, failed: str) -> VideoReport:
        """Return the result for the video."""
        names = (str(self.video), str(self.folder))
        return VideoReport(*names, self.made, len(self.kept), failed, self.losses, tuple(self.notes))

    def is_done(self, planned: Sidecar | None) -> bool:
        """Return whether an earlier run completed the video."""
        if planned is None:
            return False
        self.kept = _finished(self.folder, planned.chunks)
        if self.kept | set(planned.losses.chunks) != set(planned.chunks):
            return False
        self.losses = planned.losses
        return True

    def cut(self, facts: ChunkFacts, spans: Sequence[ByteSpan]) -> None:
        """Encode the missing chunks.

        Args:
            facts: facts of the video.
            spans: the bytes of its recordings.
        """
        settings = self.settings
        plan = plan_chunks(facts, chunk_seconds=settings.chunk_seconds, max_fps=settings.max_fps)
        self.notes += describe_plan(facts, plan)
        if len(spans) > 1:
            self.notes.append(f"it contains {len(spans)} recordings: they are cut as if they were one")
        _check_rate(self.folder, plan, kept=self.kept)
        _prepare_folder(self.folder)
        size = self.video.stat().st_size
        sidecar = Sidecar(_recorded(settings), self.video.name, size, plan.fps, plan.frames)
        sidecar.write(self.folder)
        missing = set(plan.frames) - _finished(self.folder, plan.frames)
        lost: list[int] = []
        reader = RecordingsReader(facts.path, spans)
        source = SourceReader(reader, facts=facts, plan=plan)
        picture_of = PictureFilter(facts.pixel_aspect, short_side=settings.short_side)
        for start, own_slots in _by_chunk(source, plan):
            if start in missing and _write_chunk(
                self, start, slots=own_slots, plan=plan, picture_of=picture_of, reader=reader
            ):
                self.made += 1
            elif start in missing:
                lost.append(start)
        if picture_of.changes:
            self.notes.append("its picture changes size or format: all were fitted into the first size")
        if source.lost:
            self.losses = Losses(tuple(source.lost), tuple(lost))
            replace(sidecar, losses=self.losses).write(self.folder)
            if source.cut_short:
                raise ValueError(f"{source.cut_short}; {self.losses}")


def _check_rate(folder: Path, plan: ChunkPlan, *, kept: set[int]) -> None:
    """Reject existing chunks that an earlier version planned differently."""
    planned = read_sidecar(folder) if kept else None
    if planned is not None and (planned.fps, planned.chunks) != (plan.fps, plan.frames):
        raise ValueError(
            f"{folder} contains chunks of {float(planned.fps):.4g} frames per second, but they would now have "
            f"{float(plan.fps):.4g}; delete it to create its chunks again"
        )


def _by_chunk(source: SourceReader, plan: ChunkPlan) -> Iterator[tuple[int, Iterator[Slot]]]:
    """Yield the start second and the slots of each chunk."""
    # Slots of chunks that exist are decoded, and groupby skips them.
    for chunk, slots in groupby(source.slots(), key=lambda slot: bisect_right(plan.borders, slot.index) - 1):
        yield chunk * plan.chunk_seconds, slots


def _write_chunk(
    job: _Job,
    start: int,
    *,
    slots: Iterator[Slot],
    plan: ChunkPlan,
    picture_of: PictureFilter,
    reader: RecordingsReader,
) -> bool:
    """Encode and verify one chunk; return False, without a file, if one of its pictures is lost."""
    first, count = plan.borders[start // plan.chunk_seconds], plan.frames[start]
    looked_at = plan.looked_at(count)
    looks: dict[int, np.ndarray] = {}
    profile = PROFILES[job.settings.profile]
    with ChunkWriter(job.folder / f"{start}.mp4", profile, fps=plan.fps) as writer:
        for slot in slots:
            if slot.frame is None:
                return False
            picture_of.pixel_aspect = reader.pixel_aspect
            picture = picture_of(slot.frame)
            place = max(slot.due, first) - first
            is_on_time = slot.due <= slot.index  # otherwise it is the first picture, repeated before its time
            if is_on_time and slot.index - first in looked_at and place not in looks:
                looks[place] = look_of(picture)
            writer.write(picture)
        writer.finish(looks)
    return True


def planned_frames(video: Path, folder: Path, *, settings: ChunkSettings) -> Sidecar | None:
    """Return the plan of an earlier run that cut the same file in the same way.

    Args:
        video: source file.
        folder: folder of its chunks.
        settings: the current settings.

    Returns:
        The contents of `chunks.json`, or None if it does not exist.

    Raises:
        UserError: when the folder was created with other settings, from another file, or by other means.
    """
    sidecar = read_sidecar(folder)
    if sidecar is None:
        if any(folder.glob("*.mp4")):
            raise UserError(
                f"{folder} contains chunks but no {SIDECAR}: they were not made by this command; "
                "choose another output folder or move them elsewhere"
            )
        return None
    new, size = _recorded(settings), video.stat().st_size
    if sidecar.settings != new:
        raise UserError(
            f"{folder} was made with {sidecar.settings}, not {new}; delete it or choose another output folder"
        )
    if sidecar.source_bytes != size:
        raise UserError(
            f"{folder} was made from a file of {sidecar.source_bytes} bytes, but {video} has {size}; "
            "delete it to create its chunks again"
        )
    return sidecar


def _recorded(settings: ChunkSettings) -> dict[str, object]:
    """Return the settings as recorded: with those of the encoder, so that a changed profile is detected."""
    recorded = {**asdict(settings), "encoder": asdict(PROFILES[settings.profile])}
    if not settings.max_fps:
        del recorded["max_fps"]  # compatible with folders created before this setting existed
    return recorded


def _finished(folder: Path, frames: dict[int, int]) -> set[int]:
    return {start for start in frames if (folder / f"{start}.mp4").is_file()}


def _prepare_folder(folder: Path) -> None:
    """Create the folder, and remove unfinished files of an interrupted run."""
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(PARTIAL_PATTERN):
        partial.unlink()


def chunk_folders(videos: Sequence[Path], output: Path, *, root: Path | None = None) -> list[Path]:
    """Return the folder of each video's chunks.

    Args:
        videos: source files.
        output: folder of all chunks.
        root: folder that contains the videos; their subfolders are kept. None uses only the file names.

    Returns:
        One folder per video.

    Raises:
        UserError: when two videos would share a folder, or a video is outside of `root`.
    """
    folders: dict[Path, Path] = {}
    for video in videos:
        if root is not None and not video.absolute().is_relative_to(root.absolute()):
            raise UserError(f"{video} is not inside --root {root}; give the folder that contains all videos")
        name = video.name if root is None else video.absolute().relative_to(root.absolute())
        if output / name in folders:
            raise UserError(
                f"{folders[output / name]} and {video} would both become {output / name}; "
                "give --root, the folder that contains all videos, to keep their folders separate"
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
    """Cut videos into chunks in parallel; a video that fails does not stop the others.

    Args:
        videos: source files.
        output: folder of all chunks; may contain those of an earlier run with the same settings.
        settings: how to cut.
        root: see `chunk_folders`.
        jobs: number of videos cut in parallel, with one process and one thread each; 0 for one per core.
        progress: whether to show a progress bar of finished videos.

    Returns:
        The result of each video.

    Raises:
        UserError: before any work, when names collide or a folder was created differently.
    """
    # Both are only needed in this process; the workers import this module and should load quickly.
    from pebble import ProcessPool
    from tqdm import tqdm

    folders = chunk_folders(videos, output, root=root)
    for video, folder in zip(videos, folders, strict=True):
        if video.is_file():
            planned_frames(video, folder, settings=settings)
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
        except Exception as error:  # worker boundary: any error of a worker is a failure of its video
            cause = f"{type(error).__name__}: {error}"
            reports.append(VideoReport(str(video), str(folder), failed=cause))
    return ChunkReport(tuple(reports))
