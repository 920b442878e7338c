"""Part of the GPU suite: checks that DALI's frames are correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from avion_dali.contracts import ClipPart, ClipRequest
from avion_dali.data.indexing import stream_facts
from avion_dali.decode import cpu_fused
from avion_dali.decode.packets import plan_runs
from avion_dali.decode.source import PartPackets, gather_packets, opened, read_table, run_packets
from benchmarks.decode.backends import Backend
from benchmarks.decode.measure import Agreement, compare, decoded
from benchmarks.gpu.chunks import (
    chunks_of,
    clips_to_check,
    kinds,
    open_manifest,
    read_number,
    shown_numbers,
)
from benchmarks.gpu.parts import NotRunError, Record, Suite, attempt
from benchmarks.report import Row
from pipelines.codecs import require_decodable
from pipelines.graph import GraphSettings, failure_cause, graph_inputs
from pipelines.graph_runner import GraphRunner
from pipelines.mini_clip import MiniClip, UnfitForMiniClipError, build_mini_clip

MiniClips = dict[int, MiniClip]  # by sample id
Frames = dict[int, np.ndarray]  # by sample id, uint8 (V, T, H, W, 3)

# On a CPU they are 55 dB and 0.02 levels apart. Loose enough for a GPU's rounding: one that cuts instead gives
# half a level. Half a chroma sample's offset would show as 38 dB.
RIGHT_FROM_DB, RIGHT_TO_BIAS = 45.0, 0.6


def everything_kept(part: ClipPart) -> PartPackets:
    """Packets of a part from each keyframe on, with those that no wanted frame needs."""
    with opened(part, decoder="dali") as (container, stream):
        table, packets = read_table(part, container, stream=stream)
        runs = plan_runs(table, part.frame_ids)
        return PartPackets(
            stream_facts(stream), tuple(run_packets(run, table, packets=packets) for run in runs)
        )


def planned(part: ClipPart) -> PartPackets:
    """The packets that a part needs, as the loader reads them."""
    return gather_packets(part, decoder="dali")


PACKETS: dict[str, Callable[[ClipPart], PartPackets]] = {"dropped": planned, "all kept": everything_kept}


def mini_clips(
    suite: Suite, requests: Sequence[ClipRequest], packets: Callable[[ClipPart], PartPackets]
) -> tuple[MiniClips, int]:
    """Build the mini clips of requests.

    Returns:
        Those that DALI can decode, and how many packets they have together.

    Raises:
        NotRunError: when there are none; the message says why.
    """
    found: MiniClips = {}
    count, unfit = 0, ""
    for request in requests:
        parts = [packets(part) for part in request.parts]
        try:
            require_decodable(parts, device=suite.backend)
            found[request.sample_id] = build_mini_clip(parts)
        except UnfitForMiniClipError as error:
            unfit = str(error)
            continue
        count += sum(len(run.payloads) for part in parts for run in part.runs)
    if not found:
        raise NotRunError(f"left to cpu-fused: {unfit}")
    return found, count


def graph_settings(suite: Suite, *, batch: int, threads: int) -> GraphSettings:
    """Build the library's graph at a given size."""
    return GraphSettings(
        device=suite.backend,
        device_id=0,
        batch_size=batch,
        num_views=1,
        frame_size=suite.scale.frame_size,
        num_threads=threads,
    )


def correctness(suite: Suite, record: Record) -> None:
    """Every style, with and without dropped packets: frames against `cpu-fused`, and the numbers they show."""
    suite.require_device()
    scale = suite.scale
    runner = GraphRunner(graph_settings(suite, batch=scale.batch, threads=scale.threads[0]))
    for style, size in sorted(kinds(suite), key=lambda kind: kind[0] == "vp9"):  # training on GPUs first
        for packets in PACKETS:
            row: Row = {"measured": "correctness", "style": style, "packets": packets}
            row["size"] = "x".join(map(str, size))
            record(row | attempt(partial(check, suite, runner, style, size, packets)))


def check(suite: Suite, runner: GraphRunner, style: str, size: tuple[int, int], packets: str) -> Row:
    """Decode clips with the graph and compare them with those of `cpu-fused`."""
    chunks = chunks_of(open_manifest(suite, style, size))
    requests = clips_to_check(chunks, count=suite.scale.checked, frame_size=suite.scale.frame_size)
    expected = decoded(Backend("cpu-fused", cpu_fused.decode_clip, ""), requests)
    minis, count = mini_clips(suite, requests, PACKETS[packets])
    pairs = [(clip, frames) for clip, frames in zip(requests, expected, strict=True) if clip.sample_id in minis]
    fit = [clip for clip, _ in pairs]
    frames, failures = run_batches(runner, fit, minis, batch=suite.scale.batch)
    agreement = compare_frames(fit, frames, [frames for _, frames in pairs])
    wrong = [clip.sample_id for clip in fit if clip.sample_id % 2 == 0 and _shows_wrong(clip, frames)]
    right = not failures and not wrong and is_right(agreement)
    return {
        "clips": len(fit),
        "left_to_cpu_fused": len(requests) - len(fit),
        "packets_per_clip": round(count / len(fit), 1),
        "min_psnr_db": round(agreement.psnr_db, 1),
        "max_bias_levels": round(agreement.bias_levels, 2),
        "clips_with_wrong_numbers": wrong,
        "failures": failures,
        "right": right,
    }


def is_right(agreement: Agreement) -> bool:
    """Whether two decoders' frames differ no more than their rounding does."""
    close = agreement.psnr_db >= RIGHT_FROM_DB and agreement.bias_levels <= RIGHT_TO_BIAS
    return close and not agreement.failure


def run_batches(
    runner: GraphRunner, requests: Sequence[ClipRequest], minis: MiniClips, *, batch: int
) -> tuple[Frames, list[str]]:
    """Decode clips in batches.

    Returns:
        Frames by sample id, and how batches failed.
    """
    found: Frames = {}
    failures = []
    for first in range(0, len(requests), batch):
        own = requests[first : first + batch]
        runner.put(graph_inputs([(clip, minis[clip.sample_id]) for clip in own]))
        try:
            frames, sample_ids = runner.take()
        except RuntimeError as error:
            failures.append(failure_cause(error))
            continue
        found |= dict(zip(sample_ids.tolist(), frames.cpu().numpy(), strict=True))
    return found, failures


def compare_frames(requests: Sequence[ClipRequest], found: Frames, expected: Sequence[np.ndarray]) -> Agreement:
    """Compare frames with those expected of the same clips; clips that are missing are a failure."""

    def look_up(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
        frames_VTHWC[:] = found[request.sample_id]

    return compare(Backend("dali", look_up, ""), requests, expected)


def _shows_wrong(clip: ClipRequest, frames: Frames) -> bool:
    shown = [read_number(frame) for frame in frames.get(clip.sample_id, np.empty((1, 0)))[0]]
    return shown != shown_numbers(clip)
