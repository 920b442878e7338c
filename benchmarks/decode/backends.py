"""The compared decoders: those of this project, and other libraries if they are installed.

All get the same `ClipRequest` and fill the same array. Every other library is used as its manual says a
training loader should: one file opened for a clip, one thread, frames by number, and cropping and scaling
inside the decoder where it can do that.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from avion_dali.contracts import ClipPart, ClipRequest, CropWindow
from avion_dali.decode import cpu_fused, paper_fused, reference
from avion_dali.decode.packets import spanning_run
from avion_dali.decode.rendering import SCALE_FLAGS
from avion_dali.decode.source import gather_packets, opened, read_table
from benchmarks.media import FPS

Decode = Callable[[ClipRequest, np.ndarray], None]

_CHILD_MARK = "AVION_BENCHMARK_HAS_FFMPEG"


@dataclass(frozen=True)
class Backend:
    """One way of decoding clips."""

    name: str  # as tables show it
    decode: Decode  # fills a clip's array
    conversion: str  # how its pixels are computed
    # Counts the frames decoded for a part; None if only the library knows the number.
    frames_decoded: Callable[[ClipPart], int] | None = None


def rerun_with_pyav_libraries(module: str) -> int | None:
    """Run a benchmark again in a process where other libraries find the FFmpeg that PyAV brings.

    torchcodec and spdl bring none. With PyAV's they need no system package, and all decode with one build.

    Args:
        module: what `python -m` runs.

    Returns:
        The exit status, or None when this already is that process.
    """
    if os.environ.get(_CHILD_MARK):
        return None
    with tempfile.TemporaryDirectory() as folder:
        for library in Path(av.__file__).parents[1].joinpath("av.libs").glob("lib*.so.*"):
            # Wheels carry libavcodec-<hash>.so.62.28.102, others look for libavcodec.so.62.
            plain = re.sub(r"-[0-9a-f]+\.so\.(\d+).*", r".so.\1", library.name)
            Path(folder, plain).symlink_to(library)
        paths = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment = {**os.environ, _CHILD_MARK: "1", "LD_LIBRARY_PATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        return subprocess.run(command, env=environment, check=False).returncode


def load_backends(names: Sequence[str]) -> tuple[list[Backend], dict[str, str]]:
    """Return the backends that work here, and why the others do not."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(MAKERS[name]())
        except ModuleNotFoundError as error:
            missing[name] = "not installed" if error.name in OTHER_LIBRARIES else str(error)
        except (ImportError, OSError, RuntimeError) as error:
            missing[name] = f"cannot be loaded: {str(error).splitlines()[0]}"
    return found, missing


def count_planned(part: ClipPart) -> int:
    """Frames that the packet plan decodes."""
    return sum(len(run.payloads) for run in gather_packets(part, decoder="cpu-fused").runs)


def count_spanned(part: ClipPart) -> int:
    """Frames from the keyframe before the first wanted frame to the last wanted frame."""
    with opened(part, decoder="paper-fused") as (container, stream):
        table, _ = read_table(part, container, stream=stream)
        return len(spanning_run(table, part.frame_ids).positions)


def count_everything(part: ClipPart) -> int:
    """Frames from the beginning of the file to the last wanted frame."""
    return part.frame_ids[-1] + 1


def decode_with_pyav(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
    """Seek, decode on, convert wanted frames as a whole, then crop and resize: PyAV as its manual shows it."""
    part, window = request.parts[0], request.windows[0]
    with av.open(part.chunk.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.time_base is not None
        start = stream.start_time or 0
        container.seek(start + round(part.frame_ids[0] / FPS / stream.time_base), stream=stream)
        slots = {frame_id: slot for slot, frame_id in enumerate(part.frame_ids)}
        for frame in container.decode(stream):
            frame_id = round((frame.pts - start) * stream.time_base * FPS)
            if frame_id in slots:
                rgb_HWC = frame.to_ndarray(format="rgb24")
                frames_VTHWC[0, slots[frame_id]] = _crop_and_resize(rgb_HWC, window, request.frame_size)
            if frame_id >= part.frame_ids[-1]:
                return


def _crop_and_resize(rgb_HWC: np.ndarray, window: CropWindow, frame_size: int) -> np.ndarray:
    w = window
    crop = np.ascontiguousarray(rgb_HWC[w.y : w.y + w.height, w.x : w.x + w.width])
    return np.asarray(Image.fromarray(crop).resize((frame_size, frame_size), Image.Resampling.BILINEAR))


def _make_torchcodec() -> Decode:
    import torch
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import DecoderTransform, Resize

    torch.set_num_threads(1)

    class Window(DecoderTransform):
        """A crop at a given place; torchcodec itself has them in the middle or at a place it draws."""

        def __init__(self, window: CropWindow) -> None:
            self._window = window

        def _make_transform_spec(self, input_dims: tuple[int | None, int | None]) -> str:
            w = self._window
            return f"crop, {w.height}, {w.width}, {w.x}, {w.y}"

        def _get_output_dims(self) -> tuple[int, int]:
            return self._window.height, self._window.width

    def decode(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
        part, side = request.parts[0], request.frame_size
        decoder = VideoDecoder(
            part.chunk.path,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode="approximate",
            transforms=[Window(request.windows[0]), Resize((side, side))],
        )
        frames_VTHWC[0] = decoder.get_frames_at(list(part.frame_ids)).data.numpy()

    from torchcodec._internally_replaced_utils import load_core_libraries

    load_core_libraries()  # otherwise a missing library is found only when the first file is opened
    return decode


def _make_spdl() -> Decode:
    from spdl import io

    fused = (
        "crop={w.width}:{w.height}:{w.x}:{w.y}:exact=1,scale={side}:{side}:flags="
        + SCALE_FLAGS
        + ",format=gbrp,scale={side}:{side},format=rgb24"
    )

    def decode(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
        part = request.parts[0]
        first, last = part.frame_ids[0], part.frame_ids[-1]
        # Half a frame early and late, so that rounding of times leaves none out.
        packets = io.demux_video(part.chunk.path, timestamp=((first - 0.5) / FPS, (last + 0.5) / FPS))
        filters = fused.format(w=request.windows[0], side=request.frame_size)
        wanted = [frame_id - first for frame_id in part.frame_ids]
        frames = io.sample_decode_video(packets, wanted, filter_desc=filters)
        frames_VTHWC[0] = io.to_numpy(io.convert_frames(frames))

    io.decode_config()  # loads its library, and FFmpeg, or fails
    return decode


def _make_decord() -> Decode:
    decord = importlib.import_module("decord")

    def decode(request: ClipRequest, frames_VTHWC: np.ndarray) -> None:
        part = request.parts[0]
        frames = decord.VideoReader(part.chunk.path, num_threads=1).get_batch(list(part.frame_ids)).asnumpy()
        for slot, rgb_HWC in enumerate(frames):
            frames_VTHWC[0, slot] = _crop_and_resize(rgb_HWC, request.windows[0], request.frame_size)

    return decode


_OURS = f"crop, scale ({SCALE_FLAGS}), planar RGB, RGB"
_TORCHCODEC = "crop and scale in the decoder (bilinear), RGB by swscale's default flags"
_AFTER = "whole frame to RGB by swscale's default flags, then crop and antialiased bilinear resize"

MAKERS: dict[str, Callable[[], Backend]] = {
    "cpu-fused": lambda: Backend("cpu-fused", cpu_fused.decode_clip, _OURS, count_planned),
    "paper-fused": lambda: Backend("paper-fused", paper_fused.decode_clip, _OURS, count_spanned),
    "reference": lambda: Backend(
        "reference", reference.decode_clip, "whole frame to accurate RGB, then as pyav", count_everything
    ),
    "torchcodec": lambda: Backend("torchcodec", _make_torchcodec(), _TORCHCODEC),
    "spdl": lambda: Backend("spdl", _make_spdl(), _OURS),
    "decord": lambda: Backend("decord", _make_decord(), _AFTER),
    "pyav": lambda: Backend("pyav", decode_with_pyav, _AFTER),
}
OTHER_LIBRARIES = ("torch", "torchcodec", "decord", "spdl")
