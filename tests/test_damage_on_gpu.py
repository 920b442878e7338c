"""Damage that shows only when a chunk is decoded does no harm to the clips of sound chunks."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("nvidia.dali")

from avion_dali.assembly.open_clips import open_clips
from avion_dali.data.planner import Planner
from benchmarks.corpus import FOUR, kind_manifest
from benchmarks.gpu import chunks, correctness

BATCH, BATCHES, SIDE = 8, 4, 64


def damaged_copy(source: Path, target: Path) -> None:
    """Overwrite the second half of every fifth packet; an index that is made afterwards finds nothing wrong."""
    data, rng = bytearray(source.read_bytes()), np.random.default_rng(0)
    with av.open(str(source)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for start, size in packets[1::5]:
        data[start + size // 2 : start + size] = rng.bytes(size - size // 2)
    target.parent.mkdir()
    target.write_bytes(data)


@pytest.mark.parametrize(
    ("decoder", "style", "device"),
    [
        ("dali", "vp9", "cpu"),
        ("cpu-fused", "balanced", "cpu"),
        pytest.param("dali", "balanced", "cuda", marks=pytest.mark.gpu),
        pytest.param("dali", "hevc", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_loader_goes_on_and_delivers_sound_clips(
    decoder: str, style: str, device: str, tmp_path: Path
) -> None:
    (job,) = (job for job in chunks.media_jobs(tmp_path / "media", small=True) if job.path.parts[-3] == style)
    chunks.encode(job)
    sound, folder = job.path, tmp_path / "chunks"
    (folder / "sound").mkdir(parents=True)
    shutil.copyfile(sound, folder / "sound" / "0.mp4")
    damaged_copy(sound, folder / "damaged" / "0.mp4")
    manifest = kind_manifest(folder, tmp_path / "manifest", FOUR, samples=BATCH * BATCHES)
    planner = Planner(manifest, FOUR.rules(SIDE), seed=0)
    options = {"frame_size": SIDE, "device": device, "context_length": 8, "max_bad_fraction": 1.0, "workers": 1}
    found = {}
    with open_clips(manifest, batch_size=BATCH, decoder=decoder, **options) as loader:
        for batch in loader.batches(0, BATCHES):
            frames = batch.frames_BTHWC.cpu().numpy()[:, None]
            found |= {int(batch.sample_ids[row]): frames[row] for row in np.flatnonzero(batch.valid)}
        assert loader.stats.delivered == BATCH * BATCHES
    clips = [planner.plan(sample_id, epoch=0) for sample_id in found]
    unharmed = [clip for clip in clips if "/sound/" in clip.parts[0].chunk.path]
    assert len(unharmed) > BATCH
    assert correctness.is_right(correctness.agreement_of(unharmed, found))
