"""Draws pictures that cost an encoder as much as hand-held video does, where no video is given."""

from __future__ import annotations

import math
from fractions import Fraction

import av
import numpy as np

from avion_dali.data.encoding import target_size

FRAMES_PER_SECOND = 30


def draw_pictures(*, seconds: float, short_side: int) -> tuple[np.ndarray, Fraction]:
    """Draw pictures that are about as hard to encode as hand-held video.

    They show a scene under a moving camera, a fainter scene that moves differently, which motion search cannot
    predict, and noise. Amplitudes are inversely proportional to spatial frequency, as in natural images (Field,
    JOSA A 1987).

    Args:
        seconds: length in seconds.
        short_side: height in pixels, a multiple of 16.

    Returns:
        uint8 (F, H * 3 / 2, W), YUV 4:2:0 pictures, and pictures per second.
    """
    width, height = target_size(16 * short_side, 9 * short_side, short_side=short_side)
    margin = height // 2
    rng = np.random.default_rng(0)
    near = np.stack([_texture(rng, height + margin, width + margin) for _ in range(3)], axis=-1)
    far = _texture(rng, height + margin, width + margin)[..., None]
    noise = rng.normal(0, 4, (height, width, 3)).astype(np.float32)
    planes = []
    for number in range(max(round(seconds * FRAMES_PER_SECOND), 2)):
        y, x = (int((1 + f(number / 20)) * (margin - 1) / 2) for f in (math.sin, math.cos))
        rgb = 128 + 45 * near[y : y + height, x : x + width] + 10 * far[x : x + height, y : y + width]
        rgb += np.roll(noise, rng.integers(height), axis=0)
        frame = av.VideoFrame.from_ndarray(np.clip(rgb, 0, 255).astype(np.uint8), format="rgb24")
        planes.append(frame.to_ndarray(format="yuv420p"))
    return np.stack(planes), Fraction(FRAMES_PER_SECOND)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return noise with the spectrum of natural images: float32 (height, width), zero mean, unit deviation."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width))
    picture = np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (height, width))
    return ((picture - picture.mean()) / picture.std()).astype(np.float32)
