"""Tells failures of the GPU, its driver and memory from clips that DALI cannot decode.

DALI raises RuntimeError for both. Only an error that an operator of the graph raises about its input is a
clip's, which is then replaced. A failure of the device taken for one would cost all clips, one by one.
"""

from __future__ import annotations

import re

from avion_dali.contracts import UserError

from .graph import failure_cause

DALI_ERRORS = (RuntimeError, MemoryError)
"""What DALI raises: RuntimeError, and MemoryError where C++'s `bad_alloc` leaves it unchanged."""

_OF_AN_OPERATOR = re.compile(r"Error in \w+ operator `")
# The texts of DALI 2.4 (dali/core/cuda_error.h, CUDABadAlloc and CUDAError), of CUDA and of PyTorch.
_OF_MEMORY = re.compile(r"out.of.memory|memory.?alloc|can't alloc|allocation failed|bad_alloc", re.IGNORECASE)
_OF_THE_DEVICE = re.compile(r"CUDA|nvcuvid|nvml|driver|illegal|launch", re.IGNORECASE)
# What NVDEC's functions return for a stream that they cannot decode (nvcuvid.h): cuvidParseVideoData,
# cuvidDecodePicture and cuvidMapVideoFrame are functions of the driver, so CUDA_ERROR_..., never cudaError...
_OF_THE_STREAM = re.compile(r"CUDA_ERROR_(INVALID_VALUE|INVALID_IMAGE|NOT_SUPPORTED)\b")


def require_fault_of_a_clip(error: BaseException) -> None:
    """Raise unless an error of the graph may be the fault of a clip.

    Args:
        error: one of `DALI_ERRORS`, from decoding a batch or a single clip.

    Raises:
        UserError: when memory is short; it names the settings to lower.
        RuntimeError: when the device failed, or the error does not come from an operator of the graph.
    """
    cause = failure_cause(error)
    if is_out_of_memory(error):
        raise UserError(
            f"DALI ran out of memory: {cause}; lower `batch_size`, or `graphs` if it is above 2, make chunks "
            "of a lower resolution, or leave decoding to CPU cores with `decoder` cpu-fused"
        ) from error
    if _OF_THE_DEVICE.search(cause) and not _OF_THE_STREAM.search(cause):
        raise RuntimeError(
            f"the GPU or its driver failed, and not a clip: {cause}; the cause may be a kernel of the model, "
            "which CUDA_LAUNCH_BLOCKING=1 would name; start again to resume from the last checkpoint"
        ) from error
    if not _OF_AN_OPERATOR.search(str(error)):
        raise error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory, of the GPU or of the host, is too short.

    Args:
        error: one of `DALI_ERRORS`.
    """
    return isinstance(error, MemoryError) or bool(_OF_MEMORY.search(failure_cause(error)))
