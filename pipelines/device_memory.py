"""The GPU memory that decoding with DALI takes beside the model, which PyTorch does not count."""

from __future__ import annotations

import logging

import torch
from nvidia.dali import backend

from .device_errors import DALI_ERRORS, is_out_of_memory

_log = logging.getLogger(__name__)

_BUFFERS_PER_CLIP = 8  # RGB pictures of a decoder; `num_decode_surfaces_` in frames_decoder_gpu.h
_SURFACES_PER_SESSION = 20  # NV12 pictures; the most that NVDECCache asks for (frames_decoder_gpu.cc)
_COPIES_OF_OUTPUT = 3  # resized, arranged and delivered
_RGB, _NV12 = 3, 1.5  # bytes per pixel


def pool_bytes(batch_BVTHWC: tuple[int, ...], pixels: int, *, under_way: int) -> int:
    """Estimate what DALI takes from its memory pool to decode batches on NVDEC.

    For each batch under way, with decoded pictures of `pixels` x 3 bytes: B x max(8 + T, (1 + V) x T) pictures,
    and 3 x B x V x T x H x W x 3 bytes. The decoders of a batch are all opened before the first one decodes,
    with 8 pictures each, beside the T pictures of the output (video_decoder_base.h, frames_decoder_gpu.h); they
    are closed before the pictures are cropped, once per view. Source: DALI 2.4, dali/operators/video; not
    measured.

    Args:
        batch_BVTHWC: shape of a delivered batch: clips, views, frames, height, width and channels.
        pixels: pixels of a decoded picture.
        under_way: batches under way in all graphs, `DaliStrategy.depth`.
    """
    clips, views, frames, height, width, channels = batch_BVTHWC
    pictures = clips * max(_BUFFERS_PER_CLIP + frames, (1 + views) * frames)
    output = clips * views * frames * height * width * channels
    return under_way * (pictures * pixels * _RGB + _COPIES_OF_OUTPUT * output)


def session_bytes(pixels: int, *, sessions: int) -> int:
    """Estimate what the driver takes for decode sessions: up to 20 pictures of 1.5 bytes per pixel each.

    DALI keeps sessions and uses them again, but only for pictures whose sides are multiples of 16; with others,
    there are up to 100 (`NVDECCache` in frames_decoder_gpu.cc, DALI 2.4). Not measured.

    Args:
        pixels: pixels of a decoded picture.
        sessions: clips that all graphs decode in parallel.
    """
    return int(sessions * _SURFACES_PER_SESSION * pixels * _NV12)


def reserve(num_bytes: int, device: torch.device) -> None:
    """Take memory for DALI's pool, which all graphs of the process share, before PyTorch takes it.

    Memory that the pool has and no graph uses counts, so a second loader reserves only what it needs beyond the
    first one. The number is an estimate, so a GPU with less free memory is not refused, but warned about; if
    memory does run out, the error names the settings to lower (`device_errors.py`).

    Args:
        num_bytes: from `pool_bytes`.
        device: the GPU; without an index, the current one.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        backend.PreallocateDeviceMemory(num_bytes, index)  # type: ignore[attr-defined]  # not in the stub
    except DALI_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        free, total = torch.cuda.mem_get_info(device)
        _log.warning(
            "DALI may need %.1f GiB of GPU memory beside the model, and %s has %.1f of %.1f GiB free; if "
            "memory runs out, lower `batch_size`, or `graphs` if it is above 2, make chunks of a lower "
            "resolution, or leave decoding to CPU cores with `decoder` cpu-fused",
            num_bytes / 2**30,
            device,
            free / 2**30,
            total / 2**30,
        )
