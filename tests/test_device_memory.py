"""DALI's GPU memory is estimated, and taken before PyTorch fills the rest."""

import logging
import os

import make_videos
import pytest
import torch
from dali_clips import VP9, chunk_manifest

from avion_dali.assembly.dali_loading import dali_bytes_per_clip, mean_picture_pixels, open_dali_strategy
from avion_dali.assembly.memory import plan_memory
from avion_dali.assembly.open_clips import open_clips
from avion_dali.cli.arguments import parse_options
from avion_dali.config import DaliConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.order import BatchSchedule

pytest.importorskip("nvidia.dali")

from pipelines import device_memory
from pipelines.device_memory import pool_bytes, reserve, session_bytes

BATCH = (256, 1, 4, 224, 224, 3)
SCHEDULE = BatchSchedule(1000, global_batch=256, micro_batch=256)
GPU = torch.device("cuda", 3)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("memory")
    sizes = [(96, 80), (64, 48)]
    paths = [make_videos.write_video(folder / f"{w}.mp4", frames=30, size=(w, h), **VP9) for w, h in sizes]
    return chunk_manifest(folder / "m", dict.fromkeys(paths, (0.0,)))


def test_the_estimate_follows_its_formula() -> None:
    pixels = 512 * 288
    opened, delivered = 256 * 12 * pixels * 3, 3 * 256 * 4 * 224 * 224 * 3
    assert pool_bytes(BATCH, pixels, under_way=2) == 2 * (opened + delivered)
    many_frames = (8, 2, 16, 224, 224, 3)  # cropping them for two views takes more than opening the decoders
    cropped, delivered = 8 * 48 * pixels * 3, 3 * 8 * 2 * 16 * 224 * 224 * 3
    assert pool_bytes(many_frames, pixels, under_way=1) == cropped + delivered
    assert session_bytes(pixels, sessions=16) == 16 * 20 * pixels * 3 // 2


def test_pictures_are_averaged_over_chunks(manifest: Manifest) -> None:
    assert mean_picture_pixels(manifest) == (96 * 80 + 64 * 48) / 2


def test_on_a_gpu_the_memory_is_reserved(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr(device_memory.backend, "PreallocateDeviceMemory", lambda *what: asked.append(what))
    caplog.set_level(logging.INFO)
    how = {"clip_shape": BATCH[1:], "device": GPU, "ranks_on_machine": 1}
    strategy = open_dali_strategy(DaliConfig(), manifest, schedule=SCHEDULE, **how)
    assert (strategy.depth, strategy._num_graphs, strategy._num_threads) == (2, 2, 8)
    open_dali_strategy(DaliConfig(graphs=4, threads=3), manifest, schedule=SCHEDULE, **how)
    two, four = (pool_bytes(BATCH, 5376, under_way=graphs) for graphs in (2, 4))
    assert asked == [(two, 3), (four, 3)]
    gib = (two + session_bytes(5376, sessions=16)) / 2**30
    assert f"DALI: 2 graphs x 8 threads, about {gib:.1f} GiB of GPU memory" in caplog.text


def test_on_the_cpu_cores_are_shared_and_nothing_is_reserved(manifest: Manifest) -> None:
    how = {"clip_shape": BATCH[1:], "device": torch.device("cpu"), "ranks_on_machine": 1000}
    strategy = open_dali_strategy(DaliConfig(graphs=3), manifest, schedule=SCHEDULE, **how)
    assert (strategy.depth, strategy._num_graphs, strategy._num_threads) == (3, 3, 1)


@pytest.mark.parametrize(
    "error", [MemoryError("CUDA allocation failed"), RuntimeError("CUDA allocation failed")]
)
def test_too_little_memory_is_warned_about_with_what_to_lower(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(device_memory.backend, "PreallocateDeviceMemory", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 24 * 2**30))
    reserve(int(3.5 * 2**30), GPU)
    assert "may need 3.5 GiB" in caplog.text
    assert "cuda:3 has 1.0 of 24.0 GiB free; if memory runs out, lower `batch_size`, or `graphs`" in caplog.text


def test_an_automatic_batch_leaves_room_for_dali(manifest: Manifest) -> None:
    data = DataConfig(train_manifest=str(manifest.folder), num_frames=4)
    per_clip = dali_bytes_per_clip(TrainConfig(data=data))
    assert per_clip == pool_bytes((1, 1, 4, 224, 224, 3), 5376, under_way=2)
    optim = OptimConfig(global_batch=64, micro_batch="auto")
    how = {"precision": "bf16", "ranks": 1, "free": 6 * 2**30, "parameters": 10**6}
    config = TrainConfig(data=data, optim=optim, model=ModelConfig(checkpoint_every=1))
    alone, beside = (plan_memory(config, **how, decoding=bytes_) for bytes_ in (0, 6 * 2**30 // 16))
    assert alone.micro_batch > 8 and beside.micro_batch == 8


def test_other_failures_are_raised_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUDA runtime API error cudaErrorInsufficientDriver (35):")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(device_memory.backend, "PreallocateDeviceMemory", fail)
    with pytest.raises(RuntimeError) as caught:
        reserve(1, GPU)
    assert caught.value is error


def test_settings_reach_the_graphs(manifest: Manifest) -> None:
    config = parse_options(TrainConfig, ["--dali.graphs", "3", "--dali.threads=1"], prog="x", description="")
    assert config.dali == DaliConfig(graphs=3, threads=1)
    with pytest.raises(UserError, match=r"dali.graphs = 17 is not allowed; it must be in \[0, 16\]"):
        parse_options(TrainConfig, ["--dali.graphs", "17"], prog="x", description="")
    how = {"batch_size": 1, "num_frames": 2, "frame_size": 32, "device": "cpu", "workers": 1}
    with open_clips(manifest, decoder="dali", dali=config.dali, worker_niceness=2, **how) as loader:
        assert (loader._strategy._num_graphs, loader._strategy._num_threads) == (3, 1)
        assert loader._pool.schedule(os.nice, 0).result() == os.nice(0) + 2
