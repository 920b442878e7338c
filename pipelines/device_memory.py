"""The GPU memory that DALI takes beside the model, which PyTorch does not count."""

from __future__ import annotations

import torch
from nvidia.dali import backend

from avion_dali.contracts import UserError

from .device_errors import DALI_ERRORS, is_out_of_memory

_BUFFERS_PER_CLIP = 8  # RGB pictures of a decoder; `num_decode_surfaces_` in frames_decoder_gpu.h
_SURFACES_PER_SESSION = 20  # NV12 pictures; the most that NVDECCache asks for (frames_decoder_gpu.cc)
_COPIES_OF_OUTPUT = 3  # resized, arranged and delivered
_RGB, _NV12 = 3, 1.5  # bytes per pixel


def needed_bytes(batch_BVTHWC: tuple[int, ...], pixels: int, *, under_way: int, sessions: int) -> int:
    """Estimate the GPU memory that DALI needs to decode batches on NVDEC.

    For each batch under way, with pictures of `pixels` pixels of 3 bytes:
    B x max(8 + T, (1 + V) x T) pictures, and 3 x B x V x T x H x W x 3 bytes. The decoders of a batch are all
    opened before the first one decodes, with 8 pictures each, beside the T pictures of the output
    (video_decoder_base.h, frames_decoder_gpu.h); they are closed before the pictures are cropped, once per
    view. Sessions are kept (NVDECCache), with up to 20 pictures of 1.5 bytes per pixel each. Source: DALI 2.4,
    dali/operators/video; not measured.

    Args:
        batch_BVTHWC: shape of a delivered batch: clips, views, frames, height, width and channels.
        pixels: pixels of a decoded picture.
        under_way: batches under way in all graphs, `DaliStrategy.depth`.
        sessions: clips that all graphs decode in parallel.
    """
    clips, views, frames, height, width, channels = batch_BVTHWC
    pictures = clips * max(_BUFFERS_PER_CLIP + frames, (1 + views) * frames)
    output = clips * views * frames * height * width * channels
    per_batch = pictures * pixels * _RGB + _COPIES_OF_OUTPUT * output
    return under_way * per_batch + int(sessions * _SURFACES_PER_SESSION * pixels * _NV12)


def reserve(num_bytes: int, device: torch.device) -> None:
    """Take memory for DALI's pool, which all graphs of the process share, before PyTorch takes it.

    Memory that the pool has and no graph uses counts, so a second loader reserves only what it needs beyond the
    first one.

    Args:
        num_bytes: from `needed_bytes`.
        device: the GPU; without an index, the current one.

    Raises:
        UserError: when the GPU has too little free memory.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        backend.PreallocateDeviceMemory(num_bytes, index)  # type: ignore[attr-defined]  # not in the stub
    except DALI_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        free, total = torch.cuda.mem_get_info(device)
        raise UserError(
            f"DALI needs about {num_bytes / 2**30:.1f} GiB of GPU memory beside the model, and {device} has "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free; lower `batch_size`, or `graphs` if it is "
            "above 2, make chunks of a lower resolution, or leave decoding to CPU cores with `decoder` "
            "cpu-fused"
        ) from error
