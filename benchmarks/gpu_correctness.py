"""Parts of the GPU suite: are DALI's frames the right ones, and what does it do with damaged ones?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np

from avion_dali.contracts import ClipPart, ClipRequest, DecodeError
from avion_dali.data.indexing import stream_facts
from avion_dali.decode import cpu_fused
from avion_dali.decode.packets import plan_runs
from avion_dali.decode.source import PartPackets, gather_packets, opened, read_table, run_packets
from benchmarks.decode_backends import Backend
from benchmarks.decode_measure import Agreement, compare, decoded
from benchmarks.gpu_corpus import (
    STYLES,
    chunks_of,
    clips_to_check,
    kinds,
    open_manifest,
    read_number,
    shown_numbers,
)
from benchmarks.gpu_parts import NotRunError, Record, Suite, attempt
from benchmarks.machine import Row
from pipelines.codecs import require_decodable
from pipelines.graph import GraphSettings, failure_cause, graph_inputs
from pipelines.mini_clip import MiniClip, UnfitForMiniClipError, build_mini_clip
from pipelines.source import GraphRunner

MiniClips = dict[int, MiniClip]  # by sample id
Frames = dict[int, np.ndarray]  # by sample id, uint8 (V, T, H, W, 3)

# On a CPU they are 55 dB and 0.02 levels apart. Loose enough for a GPU's rounding: one that cuts instead gives
# half a level. Half a chroma sample's offset would show as 38 dB.
RIGHT_FROM_DB, RIGHT_TO_BIAS = 45.0, 0.6


def everything_kept(part: ClipPart) -> PartPackets:
    """Packets of a part from each keyframe on, with those that no wanted frame needs."""
    with opened(part, decoder="dali") as (container, stream):
        table, packets = read_table(part, container, stream)
        runs = plan_runs(table, part.frame_ids)
        return PartPackets(stream_facts(stream), tuple(run_packets(run, table, packets) for run in runs))


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
    """The product's own graph at a given size."""
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
    for style, size in sorted(kinds(suite), key=lambda kind: kind[0] == "vp9"):  # what trains on GPUs first
        for packets in PACKETS:
            row: Row = {"measured": "correctness", "style": style, "packets": packets}
            row["size"] = "x".join(map(str, size))
            record(row | attempt(partial(check, suite, runner, style, size, packets)))


def check(suite: Suite, runner: GraphRunner, style: str, size: tuple[int, int], packets: str) -> Row:
    """Decode clips with the graph and compare them with what `cpu-fused` makes of them."""
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


def damage(suite: Suite, record: Record) -> None:
    """What becomes of damaged packets: in DALI, which checks nothing, and with the index, which does."""
    suite.require_device()
    for style in dict.fromkeys((suite.training_style, *STYLES)):
        failure = attempt(partial(damage_of, suite, style, record))
        if failure:
            record({"measured": "damage", "style": style, **failure})


def damage_of(suite: Suite, style: str, record: Record) -> Row:
    """Record what becomes of damaged packets of one style; returns nothing more to record."""
    chunks = chunks_of(open_manifest(suite, style))
    request = clips_to_check(chunks, count=1, frame_size=suite.scale.frame_size)[0]
    mini = mini_clips(suite, [request], planned)[0][0]
    expected = decoded(Backend("cpu-fused", cpu_fused.decode_clip, ""), [request])
    with damaged_chunk(suite, request) as damaged:
        row: Row = {"measured": "damage", "style": style, "with_crc": told_by_crc(damaged)}
    for kind, mini_clip in damaged_clips(mini):
        record({**row, "damage": kind, "without_crc": fate(suite, request, mini_clip, expected)})
    return {}


@contextmanager
def damaged_chunk(suite: Suite, request: ClipRequest) -> Iterator[ClipRequest]:
    """The same clip of a copy of its chunk with one byte changed in each kilobyte; its index is the old one."""
    (part,) = request.parts
    copy = suite.folder / "damaged.mp4"
    shutil.copyfile(part.chunk.path, copy)
    data = np.fromfile(copy, dtype=np.uint8)
    data[len(data) // 20 :: 1024] ^= 0x55
    data.tofile(copy)
    try:
        yield replace(request, parts=(replace(part, chunk=replace(part.chunk, path=str(copy))),))
    finally:
        copy.unlink()


def told_by_crc(request: ClipRequest) -> str:
    """What reading a damaged clip through the packet index says."""
    try:
        planned(request.parts[0])
    except DecodeError as error:
        return error.kind
    return "not noticed"


def damaged_clips(mini: MiniClip) -> Iterator[tuple[str, MiniClip]]:
    """A mini clip whole, and damaged where its packets lie, at its end."""
    data = np.frombuffer(mini.data, dtype=np.uint8)
    yield "none", mini
    flipped, zeroed = data.copy(), data.copy()
    rng = np.random.default_rng(1)
    flipped[rng.integers(len(data) // 2, len(data), 12)] ^= 0x24
    yield "12 bytes changed in the second half", replace(mini, data=flipped.tobytes())
    zeroed[len(data) * 3 // 4 :] = 0
    yield "zeros in the last quarter", replace(mini, data=zeroed.tobytes())
    yield "cut off at two thirds", replace(mini, data=data[: len(data) * 2 // 3].tobytes())


def fate(suite: Suite, request: ClipRequest, mini: MiniClip, expected: list[np.ndarray]) -> str:
    """What DALI makes of a mini clip, in a graph of its own: right or wrong frames, or an error."""
    runner = GraphRunner(graph_settings(suite, batch=1, threads=1))
    frames, failures = run_batches(runner, [request], {request.sample_id: mini}, batch=1)
    if failures:
        return f"error: {failures[0]}"
    agreement = compare_frames([request], frames, expected)
    return "right frames" if is_right(agreement) else f"wrong frames ({agreement.psnr_db:.0f} dB), no error"
