"""Determines which codecs can be decoded on this machine, by decoding a small test clip of each codec.

Importing this module imports neither PyTorch nor DALI. Calls that may crash or hang in a driver run in a
separate process with a time limit, so that they cannot end a training.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from avion_dali.cores import available_cores
from avion_dali.subprocess_call import call_in_subprocess, import_modules

if TYPE_CHECKING:
    import numpy as np

    from avion_dali.contracts import ClipRequest

Backend = Literal["nvdec", "dali-cpu", "cpu-fused"]

WORKS = "works"
# A misplaced frame differs by 20 levels per place; coding noise is below 2 levels.
MAX_DIFFERENCE_LEVELS = 6.0

_SIDE = 256  # pixels; NVDEC rejects pictures below 48 to 144 pixels, depending on codec and generation
_FRAMES, _WANTED, _STEP_LEVELS = 8, (2, 5), 20
_DALI_CPU_CODEC = "vp9"
_DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
_INSTALL_DALI = "pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 for drivers before 580)"


@dataclass(frozen=True, slots=True)
class _Encoding:
    """How the test clip of a codec is encoded: quickly, on one thread, without log messages."""

    encoder: str
    ending: str
    pix_fmt: str
    options: dict[str, str]


_ENCODINGS = {
    "h264": _Encoding("libx264", "mp4", "yuv420p", {"preset": "superfast"}),
    "hevc": _Encoding(
        "libx265",
        "mp4",
        "yuv420p",
        {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    ),
    "vp9": _Encoding("libvpx-vp9", "mp4", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    # Faster presets drop the differences between the frames of such a short clip.
    "av1": _Encoding("libsvtav1", "mp4", "yuv420p", {"preset": "8", "crf": "20", "svtav1-params": "lp=1"}),
    "mjpeg": _Encoding("mjpeg", "mov", "yuvj420p", {"q": "3"}),
}
CODECS = tuple(_ENCODINGS)


def nvdec_problem(device_index: int) -> str | None:
    """Determine whether NVDEC decodes H.264 in the project's graph; without a GPU this returns at once.

    Args:
        device_index: index of the GPU in PyTorch.

    Returns:
        None if it does, otherwise one line with the reason and the remedy.
    """
    return nvdec_obstacle(device_index) or _decode_in_subprocess("h264", "nvdec", device_index=device_index)


def codec_support(device_index: int) -> dict[str, str]:
    """Determine which codecs NVDEC decodes in the project's graph.

    Args:
        device_index: index of the GPU in PyTorch.

    Returns:
        For each of `CODECS`, `WORKS` or one line with the reason why not.
    """
    obstacle = nvdec_obstacle(device_index)
    return dict.fromkeys(CODECS, obstacle) if obstacle else _try_all("nvdec", device_index)


def cpu_codec_support() -> dict[str, str]:
    """Determine which codecs `--decoder cpu-fused` decodes; see `codec_support` for the result."""
    return _try_all("cpu-fused")


def dali_cpu_problem() -> str | None:
    """Determine whether DALI decodes VP9 on the CPU, where it supports neither H.264 nor HEVC.

    Returns:
        None if it does, otherwise one line with the reason.
    """
    return _dali_missing() or _decode_in_subprocess(_DALI_CPU_CODEC, "dali-cpu")


def dali_problem() -> str | None:
    """Determine whether DALI can be imported, without importing it in this process.

    Returns:
        None if it can, otherwise one line with the reason and the remedy.
    """
    missing = _dali_missing()
    if missing:
        return missing
    failure = call_in_subprocess(import_modules, f"{__package__}.graph")
    return failure and f"DALI cannot be imported: {failure}; reinstall it: {_INSTALL_DALI}"


def auto_decoder(nvdec: str | None) -> tuple[Literal["dali", "cpu-fused"], str]:
    """Return the decoder that `--decoder auto` selects on this machine.

    Args:
        nvdec: result of `nvdec_problem`.

    Returns:
        The decoder, and the reason.
    """
    return ("dali", "NVDEC decodes H.264 here") if nvdec is None else ("cpu-fused", nvdec)


def nvdec_obstacle(device_index: int) -> str | None:
    """Check the requirements of NVDEC without decoding: packages, driver and GPU.

    Args:
        device_index: index of the GPU in PyTorch.

    Returns:
        None if they are met, otherwise one line with the problem and the remedy.
    """
    return _dali_missing() or cuda_problem(device_index) or _driver_too_old() or nvcuvid_problem()


def cuda_problem(device_index: int) -> str | None:
    """Determine whether PyTorch can use a GPU.

    Args:
        device_index: index of the GPU in PyTorch.

    Returns:
        None if it can, otherwise one line with the reason and the remedy.
    """
    driver = driver_cuda_version()
    if driver is None:
        return "no NVIDIA driver (libcuda.so.1); with a GPU install one, and start containers with --gpus all"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"PyTorch cannot be imported ({error}); reinstall it: pip install --force-reinstall torch"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; on a machine with a GPU install a CUDA build (pytorch.org)"
    with warnings.catch_warnings():  # about a driver that is too old
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device_index < count:
        return None
    if count:
        return f"there is no GPU {device_index}, PyTorch sees {count}; GPUs are counted from 0"
    return _no_gpu(torch.version.cuda, driver)


def _no_gpu(built_for: str, driver: tuple[int, int]) -> str:
    if driver[0] < int(built_for.split(".")[0]):
        return f"the driver supports CUDA {driver[0]}.{driver[1]}, PyTorch needs {built_for}; update the driver"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"no GPU is visible with CUDA_VISIBLE_DEVICES={visible!r}; unset it"
    return "the NVIDIA driver shows no GPU; run nvidia-smi for details"


def driver_cuda_version() -> tuple[int, int] | None:
    """Return the newest CUDA version that the NVIDIA driver supports, or None without a driver."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return (version.value // 1000, version.value % 1000 // 10) if status == 0 else None


def dali_package() -> tuple[str, str] | None:
    """Return name and version of the DALI package that pip installed, or None."""
    for name in _DALI_PACKAGES:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _dali_missing() -> str | None:
    if sys.platform != "linux":
        return "NVIDIA DALI exists for Linux only; --decoder cpu-fused delivers the same clips"
    try:
        found = util.find_spec("nvidia.dali")
    except ModuleNotFoundError:
        found = None
    return None if found else f"DALI is not installed; {_INSTALL_DALI}"


def _driver_too_old() -> str | None:
    """Compare the driver with the CUDA version in the name of DALI's package."""
    driver, package = driver_cuda_version(), dali_package()
    if driver is None or package is None:
        return None
    needed = int(package[0].rpartition("cuda")[2]) // 10
    if driver[0] >= needed:
        return None
    known = f"{driver[0]}.{driver[1]}"
    return f"the driver supports CUDA {known}, {package[0]} needs {needed}; update it, or {_INSTALL_DALI}"


def nvcuvid_problem() -> str | None:
    """Determine whether the driver's video library can be loaded.

    Returns:
        None if it can, otherwise one line with the remedy.
    """
    for name in ("libnvcuvid.so.1", "libnvcuvid.so"):  # the names that DALI tries
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return None
    return (
        "the driver's video library libnvcuvid.so.1 is missing; start containers with the capability `video`: "
        "NVIDIA_DRIVER_CAPABILITIES=compute,video,utility"
    )


def _try_all(backend: Backend, device_index: int = 0) -> dict[str, str]:
    """Decode a clip of each codec in a separate process, since a failure may leave the GPU unusable."""
    with ThreadPoolExecutor(min(available_cores(), len(CODECS))) as pool:
        problems = pool.map(
            lambda codec: _decode_in_subprocess(codec, backend, device_index=device_index), CODECS
        )
        return {codec: problem or WORKS for codec, problem in zip(CODECS, problems, strict=True)}


@cache
def _decode_in_subprocess(codec: str, backend: Backend, *, device_index: int = 0) -> str | None:
    """Call `decode_problem` once per process and device: a training asks for the same one several times.

    The answer takes seconds: Python, PyTorch and DALI start, and a CUDA context.
    """
    failure = call_in_subprocess(decode_problem, codec, backend, device_index)
    return failure and f"test clip of {codec}: {failure}"


def decode_problem(codec: str, backend: Backend, device_index: int = 0) -> str | None:
    """Encode a test clip, decode it and check its frames; `call_in_subprocess` runs this function.

    Args:
        codec: one of `CODECS`.
        backend: the decoder. `cpu-fused` is compared with the painted pictures, DALI with `cpu-fused`.
        device_index: index of the GPU in PyTorch, for `nvdec`.

    Returns:
        None if the frames are correct, otherwise the problem.
    """
    import av
    import numpy as np

    from avion_dali.decode import cpu_fused

    with tempfile.TemporaryDirectory() as folder:
        try:
            request = _tiny_clip(Path(folder), codec)
        except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
            return f"not tested, because PyAV cannot encode it ({_ENCODINGS[codec].encoder}: {error})"
        frames_VTHWC = np.empty(request.frames_shape, dtype=np.uint8)
        cpu_fused.decode_clip(request, frames_VTHWC)
        expected_VTHWC = np.stack([[_paint(number) for number in _WANTED]])
        if backend != "cpu-fused":
            expected_VTHWC = frames_VTHWC
            found = _decode_with_dali(request, backend, device_index=device_index)
            if isinstance(found, str):
                return found
            frames_VTHWC = found
    difference = np.abs(frames_VTHWC.astype(np.float64) - expected_VTHWC).mean()
    wrong = f"its pictures differ by {difference:.1f} levels on average"
    return None if difference <= MAX_DIFFERENCE_LEVELS else wrong


def _decode_with_dali(request: ClipRequest, backend: Backend, *, device_index: int) -> np.ndarray | str:
    """Return frames, uint8 (V, T, H, W, C), or the reason why DALI cannot decode them."""
    from avion_dali.decode.source import gather_packets

    from .codecs import Device, require_decodable
    from .mini_clip import UnfitForMiniClipError, build_mini_clip

    device: Device = "mixed" if backend == "nvdec" else "cpu"
    try:
        parts = [gather_packets(part, decoder="dali") for part in request.parts]
        require_decodable(parts, device=device)
        mini_clip = build_mini_clip(parts)
    except UnfitForMiniClipError as error:
        return str(error)
    try:
        from .device_errors import DALI_ERRORS
        from .graph import GraphSettings, failure_cause, graph_inputs
        from .graph_runner import GraphRunner
    except (ImportError, OSError) as error:
        return f"DALI cannot be imported: {error}"
    settings = GraphSettings(
        device=device,
        device_id=device_index,
        batch_size=1,
        num_views=1,
        frame_size=request.frame_size,
        num_threads=1,
        prefetch_depth=1,
    )
    try:
        runner = GraphRunner(settings)
        runner.put(graph_inputs([(request, mini_clip)]))
        frames, _ = runner.take()
        return frames[0].cpu().numpy()
    # PyTorch raises BufferError for memory that it cannot take from DALI, such as pinned memory.
    except (*DALI_ERRORS, BufferError) as error:
        return failure_cause(error)


def _paint(number: int) -> np.ndarray:
    """Return a picture, uint8 (H, W, 3) RGB, with smooth colors that get brighter with the frame number."""
    import numpy as np

    y, x = np.mgrid[0:_SIDE, 0:_SIDE]
    return (np.stack([x // 4, y // 4, (x + y) // 8], axis=-1) + _STEP_LEVELS * number).astype(np.uint8)


def _tiny_clip(folder: Path, codec: str) -> ClipRequest:
    """Encode the painted pictures, and return a request for two uncropped frames."""
    import av

    from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, CropWindow

    how = _ENCODINGS[codec]
    path = folder / f"{codec}.{how.ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(how.encoder, rate=30, options=how.options)
        stream.width, stream.height, stream.pix_fmt = _SIDE, _SIDE, how.pix_fmt
        stream.thread_count = 1
        for number in range(_FRAMES):
            frame = av.VideoFrame.from_ndarray(_paint(number), format="rgb24").reformat(format=how.pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    chunk = ChunkRef(str(path), path.stat().st_size, _FRAMES, _SIDE, _SIDE)
    window = CropWindow(0, 0, _SIDE, _SIDE)
    return ClipRequest(0, 0, (ClipPart(chunk, _WANTED),), (0, 1), (window,), (False,), _SIDE)
