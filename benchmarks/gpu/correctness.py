"""Part of the GPU suite: DALI's frames against those of libavcodec."""

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
from benchmarks.gpu.chunks import chunks_of, clips_to_check, kinds, open_manifest, read_number, shown_numbers
from benchmarks.gpu.parts import NotRunError, Record, Suite, attempt
from benchmarks.report import Row
from pipelines.codecs import require_decodable
from pipelines.graph import GraphSettings, failure_cause, graph_inputs
from pipelines.graph_runner import GraphRunner
from pipelines.mini_clip import MiniClip, UnfitForMiniClipError, build_mini_clip

MiniClips = dict[int, MiniClip]  # by sample id
Frames = dict[int, np.ndarray]  # by sample id, uint8 (V, T, H, W, 3)
Packets = Callable[[ClipPart], PartPackets]

# On a CPU they are 55 dB and 0.02 levels apart. Loose enough for a GPU's rounding: one that cuts instead gives
# half a level. Half a chroma sample's offset would show as 38 dB.
RIGHT_FROM_DB, RIGHT_TO_BIAS = 45.0, 0.6


planned: Packets = partial(gather_packets, decoder="dali")
"""The packets that a part needs, as the loader reads them."""


def everything_kept(part: ClipPart) -> PartPackets:
    """Packets of a part from each keyframe on, with those that no wanted frame needs."""
    with opened(part, decoder="dali") as (container, stream):
        table, packets = read_table(part, container, stream=stream)
        runs = (run_packets(run, table, packets=packets) for run in plan_runs(table, part.frame_ids))
        return PartPackets(stream_facts(stream), tuple(runs))


def mini_clips(suite: Suite, requests: Sequence[ClipRequest], packets: Packets) -> tuple[MiniClips, int]:
    """Build the mini clips that DALI can decode, and count their packets."""
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


def frames(suite: Suite, record: Record) -> None:
    """Every style's frames against `cpu-fused`, and the numbers they show."""
    suite.require_dali()
    sizes = {"batch_size": suite.scale.checked // 2, "num_views": 1, "frame_size": suite.scale.frame_size}
    threads = suite.scale.graphs[-1].threads
    runner = GraphRunner(GraphSettings(device=suite.backend, device_id=0, num_threads=threads, **sizes))
    for chunks in kinds(suite):
        for name, packets in (("planned", planned), ("all kept", everything_kept)):
            row = attempt(partial(check, suite, runner, chunks, packets))
            record({"measured": "frames", "chunks": chunks, "packets": name, **row})
            if row.get("right") is not False:  # else: is it the packets that were left out?
                break


def check(suite: Suite, runner: GraphRunner, name: str, packets: Packets) -> Row:
    """Decode clips with the graph and compare them with those of `cpu-fused`."""
    chunks = chunks_of(open_manifest(suite, name))
    requests = clips_to_check(chunks, count=suite.scale.checked, frame_size=suite.scale.frame_size)
    minis, count = mini_clips(suite, requests, packets)
    fit = [clip for clip in requests if clip.sample_id in minis]
    found, failures = run_batches(runner, fit, minis, batch=suite.scale.checked // 2)
    agreement = agreement_of(fit, found)
    wrong = [clip.sample_id for clip in fit if clip.sample_id % 2 == 0 and _shows_wrong(clip, found)]
    return {
        "right": not failures and not wrong and is_right(agreement),
        "clips": len(fit),
        "left_to_cpu_fused": len(requests) - len(fit),
        "packets_per_clip": round(count / len(fit), 1),
        "min_psnr_db": round(agreement.psnr_db, 1),
        "max_bias_levels": round(agreement.bias_levels, 2),
        "clips_with_wrong_numbers": wrong,
        "failures": failures,
    }


def is_right(agreement: Agreement) -> bool:
    """Whether two decoders' frames differ no more than their rounding does."""
    rounding = agreement.psnr_db >= RIGHT_FROM_DB and agreement.bias_levels <= RIGHT_TO_BIAS
    return rounding and not agreement.failure


def run_batches(
    runner: GraphRunner, requests: Sequence[ClipRequest], minis: MiniClips, *, batch: int
) -> tuple[Frames, list[str]]:
    """Decode clips in batches; returns the frames, and how batches failed."""
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


def agreement_of(requests: Sequence[ClipRequest], found: Frames) -> Agreement:
    """Compare frames with those of `cpu-fused`; clips that are missing are a failure."""
    expected = decoded(Backend("cpu-fused", cpu_fused.decode_clip, ""), requests)

    def look_up(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
        frames_VTHWC[:] = found[request.sample_id]

    return compare(Backend("dali", look_up, ""), requests, expected)


def _shows_wrong(clip: ClipRequest, frames: Frames) -> bool:
    shown = [read_number(frame) for frame in frames.get(clip.sample_id, np.empty((1, 0)))[0]]
    return shown != shown_numbers(clip)
