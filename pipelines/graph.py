"""The DALI graph, which decodes mini clips to square uint8 clips, on NVDEC (`mixed`) or on the CPU.

Reasons for each step (DALI 2.4):

- `external_source` calls a function in this process for each batch. DALI's worker processes are not used,
  because a killed worker can block the training. A batch may be smaller than the pipeline's batch size, so a
  last batch needs no padding.
- `decoders.video` takes the requested frames by number, each number once, because a repeated number decodes the
  clip again from its start. Numbers out of range must raise (`pad_mode="none"`); the default delivers black
  frames.
- `slice` runs before `resize`, instead of `resize` with a region: near the border of a region, `resize` reads
  pixels beyond it, which the CPU decoders do not have because they crop first. For crop windows of training the
  difference is at most 0.5 dB; for small windows at a border it is 4 dB, and an upscaled one was at 43 dB. All
  views share one decode.
- `resize` with antialiasing is the triangle filter that swscale calls bilinear.
- `flip` runs after `resize`, where there are fewest pixels; the result is within one level of flipping first.
- `sequence_rearrange` runs last, so repeated frames are decoded and resized once. Every clip then has T frames,
  which makes the batch one dense tensor.

The graph makes no random choices; all random choices of a clip are in its request.

A clip that cannot be decoded raises RuntimeError for its whole batch without naming the clip; to find it, the
batch must be decoded again one clip at a time. The dynamic executor continues with the next batch, although the
message says otherwise; the older executor does not. DALI's iterator, however, does not schedule a batch in
place of one that raised: after `prefetch_depth` errors it ends early (StopIteration), without losing a batch,
and continues after its `reset`.

On a CPU, a VP9 clip of 4 frames of 512x288 takes about 20 ms (`benchmarks.loader.dali`): 15 to decode it to
whole RGB pictures, 4 for `resize`, which uses plain floating-point code, 0.5 for `slice` and 0.1 for the rest.
`cpu-fused` takes 14, of which cropping, scaling and conversion to RGB together take 0.7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.types import DALIDataType, DALIInterpType

from avion_dali.contracts import ClipRequest, CropWindow
from avion_dali.cores import available_cores

from .codecs import Device
from .mini_clip import MiniClip

GraphInputs = tuple[list[np.ndarray], np.ndarray, np.ndarray]

OUTPUTS = ("frames", "sample_ids")

_DTYPES = [DALIDataType.UINT8, DALIDataType.INT32, DALIDataType.INT64]
_NDIMS = [1, 1, 0]
# The numbers of a clip, see `graph_inputs`: two counts, and five numbers per view.
_COUNTS, _PER_VIEW = 2, 5


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """Settings of a graph.

    Args:
        device: `mixed` decodes on NVDEC; `cpu` decodes VP8, VP9 and MJPEG, the codecs of DALI's own FFmpeg.
        device_id: index of the GPU; ignored for `cpu`.
        batch_size: largest number of clips in a batch.
        num_views: V, crop windows per clip.
        frame_size: side of the square output in pixels.
        num_threads: clips decoded in parallel; see `default_threads`.
        prefetch_depth: batches under way in the graph. With 2, the host works on one while the device works on
            the other.
    """

    device: Device
    device_id: int
    batch_size: int
    num_views: int
    frame_size: int
    num_threads: int
    prefetch_depth: int = 2


def default_graphs(device: Device) -> int:
    """Return the number of graphs that decode batches in turn.

    On NVDEC, all threads of a graph convert and copy their frames on the graph's one CUDA stream and wait for
    it after each frame, and a batch is opened as a whole before its first frame is decoded (DALI 2.4,
    video_decoder_base.h, frames_decoder_gpu.cc). A second graph has a stream of its own and decodes while the
    first one opens its batch. On the CPU there are no streams, and one graph uses all cores.

    Args:
        device: device on which frames are decoded.
    """
    return 2 if device == "mixed" else 1


def default_threads(device: Device, ranks_on_machine: int = 1, *, graphs: int = 1) -> int:
    """Return the number of clips that each graph decodes in parallel.

    On the CPU, the graphs have one thread per core together. With NVDEC, a thread mostly waits for its decode
    session, and one session uses one of the GPU's engines (7 on H100 and H200, 4 on L4), so it is two per
    engine for up to 8 engines.

    Args:
        device: device on which frames are decoded.
        ranks_on_machine: training processes that share the cores.
        graphs: graphs of one process, which share its threads.
    """
    threads = 16 if device == "mixed" else available_cores() // ranks_on_machine
    return max(1, threads // graphs)


def graph_inputs(clips: Sequence[tuple[ClipRequest, MiniClip]]) -> GraphInputs:
    """Return a batch in the form of the graph's source.

    The numbers of a batch are one array, because each array of its own costs this thread 0.005 to 0.01 ms per
    clip, whatever its size.

    Args:
        clips: requests and their mini clips, all with V views and T frames.

    Returns:
        A list of mini clips uint8 (bytes,); numbers int32 (B, 2 + 5 V + 2 T); sample ids int64 (B,). The
        numbers of a clip are T, how many frames are decoded (at most T), for each view the window's y, x,
        height and width and whether it is flipped, then T indices into the decoded frames, and the frame
        numbers to decode, followed by zeros.
    """
    mini_clips = [np.frombuffer(mini.data, dtype=np.uint8) for _, mini in clips]
    numbers = [_numbers(r.windows, r.flips, order=(r.gather, mini.frame_ids)) for r, mini in clips]
    sample_ids = np.array([request.sample_id for request, _ in clips], dtype=np.int64)
    return mini_clips, np.array(numbers, dtype=np.int32), sample_ids


def _numbers(
    windows: Sequence[CropWindow], flips: Sequence[bool], *, order: tuple[Sequence[int], Sequence[int]]
) -> list[int]:
    gather, frame_ids = order
    length, decoded = len(gather), len(frame_ids)
    numbers = [length, decoded]
    for window, is_flipped in zip(windows, flips, strict=True):
        numbers += [window.y, window.x, window.height, window.width, is_flipped]
    return [*numbers, *gather, *frame_ids, *[0] * (length - decoded)]


def failure_cause(error: BaseException) -> str:
    """Return the line of DALI's message that states the cause; the other lines state where it occurred.

    Args:
        error: the error of the pipeline.
    """
    before, found, after = str(error).partition("encountered:")
    return ((after if found else before).strip().splitlines() or ["no reason given"])[0]


def build_graph(source: Callable[[], GraphInputs], settings: GraphSettings) -> Pipeline:
    """Build the pipeline with the outputs `OUTPUTS`.

    `frames` is uint8 (V, T, H, W, C) per clip, RGB, on the GPU for `mixed`; `sample_ids` is int64, on the CPU,
    in input order.

    Args:
        source: returns the next batch, see `graph_inputs`. It is called `prefetch_depth` batches ahead; at the
            end, every call raises StopIteration until the pipeline is reset.
        settings: settings of the graph.
    """
    pipeline = _clip_graph(
        source,
        settings,
        batch_size=settings.batch_size,
        num_threads=settings.num_threads,
        device_id=settings.device_id if settings.device == "mixed" else None,
        prefetch_queue_depth=settings.prefetch_depth,
        exec_dynamic=True,
    )
    pipeline.build()
    return pipeline


@pipeline_def
def _clip_graph(source: Callable[[], GraphInputs], settings: GraphSettings) -> Any:
    encoded, numbers, sample_id = fn.external_source(
        source=source, num_outputs=len(_DTYPES), batch=True, dtype=_DTYPES, ndim=_NDIMS
    )
    first = _COUNTS + _PER_VIEW * settings.num_views
    end = first + numbers[0]
    gather, frame_ids = numbers[first:end], numbers[end : end + numbers[1]]
    video_FHWC = fn.decoders.video(encoded, device=settings.device, frames=frame_ids, pad_mode="none")
    size = [settings.frame_size, settings.frame_size]
    views = []
    for v in range(settings.num_views):
        at = _COUNTS + _PER_VIEW * v
        frames_FHWC: Any = fn.slice(
            video_FHWC, start=numbers[at : at + 2], shape=numbers[at + 2 : at + 4], axis_names="HW"
        )
        frames_FHWC = fn.resize(
            frames_FHWC, size=size, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True
        )
        frames_FHWC = fn.flip(frames_FHWC, horizontal=numbers[at + 4])
        views.append(fn.sequence_rearrange(frames_FHWC, new_order=gather))
    return fn.stack(*views), sample_id
