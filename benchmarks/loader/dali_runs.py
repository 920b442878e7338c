"""Measurements of `benchmarks.loader.dali`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.types import DALIDataType, DALIInterpType

from avion_dali.contracts import ClipRequest
from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import Planner
from avion_dali.decode.source import gather_packets
from avion_dali.files import whole_or_absent
from benchmarks.corpus import FOUR, chunk_sources, kind_manifest
from benchmarks.loader.measure import LoaderBench, load
from benchmarks.report import Row
from pipelines.graph import GraphInputs, GraphSettings, build_graph, graph_inputs
from pipelines.mini_clip import MiniClip, build_mini_clip

DECODERS = ("cpu-fused", "dali")
BATCH, BATCHES = 16, 3  # of the graph's measurements
FRAME_SIZE = 224
_SIZE: dict[str, Any] = {
    "size": [FRAME_SIZE, FRAME_SIZE],
    "interp_type": DALIInterpType.INTERP_LINEAR,
    "antialias": True,
}
# Nothing is prefetched: it would run, and be counted, while another pipeline is measured.
_ALONE: dict[str, Any] = {
    "batch_size": BATCH,
    "num_threads": 1,
    "device_id": None,
    "prefetch_queue_depth": 1,
    "exec_dynamic": True,
}
Manifests = dict[str, Manifest]  # by codec
Clip = tuple[ClipRequest, MiniClip]


def prepare(videos: Sequence[Path], folder: Path) -> Manifests:
    """Cut the videos into VP9 chunks, and encode the first of them again as MJPEG."""
    chunks = {"vp9": chunk_sources(videos, folder / "vp9", "vp9"), "mjpeg": folder / "mjpeg"}
    for path in sorted(chunks["vp9"].glob("*/*.mp4")):
        target = chunks["mjpeg"] / path.relative_to(chunks["vp9"])
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_mjpeg(path, target)
    return {codec: kind_manifest(chunks[codec], folder / f"{codec}.manifest", FOUR) for codec in chunks}


def _write_mjpeg(source: Path, target: Path) -> None:
    with (
        whole_or_absent(target) as partial,
        av.open(str(source)) as reader,
        av.open(str(partial), "w", format="mov") as writer,
    ):
        like, stream = reader.streams.video[0], writer.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = like.width, like.height, "yuvj420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 3
        for frame in reader.decode(video=0):
            picture = frame.reformat(format="yuvj420p")
            picture.pict_type = 0
            writer.mux(stream.encode(picture))
        writer.mux(stream.encode(None))


def run_all(manifests: Manifests, *, rounds: int, seconds: float) -> list[Row]:
    """Every measurement."""
    rows: list[Row] = []
    for codec, manifest in manifests.items():
        rows += loaders(codec, manifest, rounds=rounds, seconds=seconds)
    vp9 = manifests["vp9"]  # MJPEG chunks are ten times as long
    return [*rows, *graphs(some_clips(vp9), rounds=rounds), *literal_versions(vp9, rounds=rounds)]


def loaders(codec: str, manifest: Manifest, *, rounds: int, seconds: float) -> list[Row]:
    """Both loaders in turn, and how they compare."""
    best: dict[str, Row] = {}
    bench = LoaderBench(seconds=seconds, warm_s=seconds / 2, micro_batch=BATCH, frame_size=FRAME_SIZE)
    for decoder in DECODERS * rounds:
        row = load(manifest, FOUR, decoder, workers=0, bench=bench)
        row["cpu_ms_per_clip"] = round(row["worker_cpu_ms_per_clip"] + row["trainer_cpu_ms_per_clip"], 3)
        before = best.get(decoder, row)
        best[decoder] = max(before, row, key=lambda r: r["clips_per_s"])
        best[decoder]["cpu_ms_per_clip"] = min(before["cpu_ms_per_clip"], row["cpu_ms_per_clip"])
    cpu, dali = (best[decoder] for decoder in DECODERS)
    ratio = {
        "measured": "loader, dali over cpu-fused",
        "codec": codec,
        "clips_per_s": round(dali["clips_per_s"] / cpu["clips_per_s"], 3),
        "clips_per_cpu_s": round(cpu["cpu_ms_per_clip"] / dali["cpu_ms_per_clip"], 3),
    }
    rows = [{"measured": "loader", "codec": codec, "decoder": d, **row} for d, row in best.items()]
    return [*rows, ratio]


def some_clips(manifest: Manifest) -> list[Clip]:
    """A few batches of clips."""
    planner = Planner(manifest, FOUR.rules(FRAME_SIZE), seed=0)
    requests = [planner.plan(row, 0) for row in range(BATCH * BATCHES)]
    return [(request, mini_clip(request)) for request in requests]


def mini_clip(request: ClipRequest) -> MiniClip:
    """Return what a worker makes of a clip."""
    return build_mini_clip([gather_packets(part, decoder="dali") for part in request.parts])


def whole_chunk(clip: Clip) -> Clip:
    """The clip's whole file in the mini clip's place; clips are of one chunk each."""
    request, mini = clip
    (part,) = request.parts
    return request, MiniClip(Path(part.chunk.path).read_bytes(), part.frame_ids, mini.colorspace)


def graphs(clips: Sequence[Clip], *, rounds: int) -> list[Row]:
    """Processor time of a clip: its mini clip, the graph, and the graph on whole chunks."""
    settings = GraphSettings("cpu", 0, BATCH, 1, FRAME_SIZE, num_threads=1, prefetch_depth=1)
    whole = [whole_chunk(clip) for clip in clips]

    def make_mini_clips() -> None:
        for request, _ in clips:
            mini_clip(request)

    pipelines: dict[str, Callable[[], None]] = {
        "mini clip (in a worker)": make_mini_clips,
        "whole graph": runner(build_graph(repeating(batches_of(clips)), settings)),
        "whole graph on whole chunks": runner(build_graph(repeating(batches_of(whole)), settings)),
    }
    best = cheapest(pipelines, len(clips), rounds=rounds)
    what = {"measured": "graph", "codec": "vp9"}
    rows: list[Row] = [{**what, "up_to": name, "cpu_ms_per_clip": round(ms, 3)} for name, ms in best.items()]
    times = best["whole graph on whole chunks"] / best["whole graph"]
    return [*rows, {"measured": "mini clips over whole chunks", "codec": "vp9", "times": round(times, 2)}]


def batches_of(clips: Sequence[Clip]) -> list[GraphInputs]:
    return [graph_inputs(clips[first : first + BATCH]) for first in range(0, len(clips), BATCH)]


def repeating(batches: Sequence[GraphInputs]) -> Callable[[], GraphInputs]:
    """A source that never ends."""
    given = 0

    def source() -> GraphInputs:
        nonlocal given
        given += 1
        return batches[given % len(batches)]

    return source


def runner(pipeline: Pipeline) -> Callable[[], None]:
    """Runs a pipeline for as many batches as clips were made for."""

    def run() -> None:
        for _ in range(BATCHES):
            pipeline.run()

    return run


def cheapest(tasks: dict[str, Callable[[], None]], clips: int, *, rounds: int) -> dict[str, float]:
    """Return the smallest processor time of each task in ms per clip; the tasks alternate."""
    best: dict[str, float] = {}
    for run in range(rounds + 1):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            if run:  # the first run fills caches
                ms = 1000 * (time.process_time() - start) / clips
                best[name] = min(best.get(name, ms), ms)
    return best


def literal_versions(manifest: Manifest, *, rounds: int) -> list[Row]:
    """The two ways DALI offers to read videos by itself, at 4 frames of a second, whole pictures.

    Neither accepts the clips of a step or their crop windows.
    """
    paths = [manifest.chunk(row).ref.path for row in range(manifest.num_chunks)]
    last = min(manifest.chunk(row).ref.num_frames for row in range(manifest.num_chunks)) - 29

    @pipeline_def(**_ALONE, seed=0)
    def whole_files() -> Any:
        encoded, _ = fn.readers.file(files=paths, random_shuffle=True)
        start = fn.random.uniform(range=[0, last], dtype=DALIDataType.INT32)
        frames = fn.decoders.video(encoded, device="cpu", start_frame=start, sequence_length=4, stride=8)
        return fn.resize(frames, **_SIZE)

    @pipeline_def(**_ALONE, seed=0)
    def video_reader() -> Any:
        frames = fn.experimental.readers.video(
            device="cpu", filenames=paths, sequence_length=4, stride=8, step=30, random_shuffle=True
        )
        return fn.resize(frames, **_SIZE)

    names = {"fn.readers.file -> fn.decoders.video": whole_files, "fn.experimental.readers.video": video_reader}
    tasks = {}
    for name, definition in names.items():
        pipeline = definition()
        pipeline.build()
        tasks[name] = runner(pipeline)
    best = cheapest(tasks, BATCH * BATCHES, rounds=rounds)
    return [
        {"measured": "literal version", "codec": "vp9", "version": name, "cpu_ms_per_clip": round(ms, 3)}
        for name, ms in best.items()
    ]
