"""What `import avion_dali` offers: light to import, the same clips everywhere, errors in its own words."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch_data import LaunchData, launch_data  # noqa: F401 - a fixture
from torch.utils.data import DataLoader

import avion_dali
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest

ROOT = Path(__file__).parents[1]
OFFERED = ["ClipDataset", "ClipLoader", "DecodeError", "UserError", "__version__", "decode_clip", "open_clips"]
SMALL: dict[str, Any] = {"num_frames": 2, "frame_size": 32, "seed": 3}


def open_small(manifest: Path, **options: Any) -> Any:
    more = {"batch_size": 2, "workers": 1, "decoder": "cpu-fused", "device": "cpu", **SMALL}
    return avion_dali.open_clips(manifest, **(more | options))


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = ("torch", "nvidia", "av", "numpy", "pyarrow", "open_clip")
    code = f"import sys, avion_dali; print(*avion_dali.__all__); print(*set({heavy!r}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [" ".join(OFFERED), ""]
    assert set(OFFERED) <= set(dir(avion_dali))
    with pytest.raises(AttributeError, match="no attribute 'open_clip'"):
        avion_dali.open_clip  # noqa: B018


def test_the_loader_and_the_dataset_deliver_the_same_clips(data: LaunchData) -> None:
    dataset = avion_dali.ClipDataset(data.own, **SMALL)
    with open_small(data.own) as loader:
        assert (len(loader), len(dataset)) == (6, 12)
        for epoch in range(2):
            dataset.set_epoch(epoch)
            batches = list(loader)
            assert {batch.epoch for batch in batches} == {epoch}
            assert sorted(i for batch in batches for i in batch.sample_ids.tolist()) == list(range(12))
            for batch in batches:
                assert_same(batch, [dataset[i] for i in batch.sample_ids.tolist()])
        assert loader.stats.delivered == 24


def assert_same(batch: Any, items: list[dict[str, Any]]) -> None:
    assert batch.tokens_BL.shape == (2, 77)
    assert torch.equal(batch.frames_BTHWC, torch.stack([item["frames"] for item in items]))
    assert torch.equal(batch.tokens_BL, torch.stack([item["tokens"] for item in items]))
    assert batch.labels_B.tolist() == [item["label"] for item in items]
    assert batch.sample_ids.tolist() == [item["sample_id"] for item in items]
    assert all(item["valid"] for item in items)


@pytest.mark.parametrize("decoder", ["cpu-fused", "dali"])
def test_a_state_goes_on_with_other_workers_ranks_and_decoder(data: LaunchData, decoder: str) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    with open_small(data.own, batch_size=4) as loader:
        whole = [batch.sample_ids.tolist() for batch in loader]
        loader.set_epoch(0)
        next(iter(loader))
        state = loader.state_dict()
    rest: list[list[int]] = []
    for rank in range(2):
        with open_small(data.own, workers=2, decoder=decoder, rank=rank, world_size=2) as loader:
            loader.load_state_dict(state)
            rest.append([i for batch in loader for i in batch.sample_ids.tolist()])
    assert [rest[0][0:2] + rest[1][0:2], rest[0][2:4] + rest[1][2:4]] == whole[1:]


def test_an_evaluation_drops_nothing_and_keeps_the_order(data: LaunchData) -> None:
    with open_small(data.own, training=False, batch_size=5, eval_clips=2, eval_crops=3) as loader:
        batches = list(loader)
    assert [i for batch in batches for i in batch.sample_ids.tolist()] == [i for i in range(12) for _ in "ab"]
    assert batches[0].frames_BTHWC.shape == (15, 2, 32, 32, 3)
    dataset = avion_dali.ClipDataset(data.own, training=False, eval_clips=2, eval_crops=3, **SMALL)
    assert len(dataset) == 24
    assert torch.equal(dataset[1]["frames"], batches[0].frames_BTHWC[3:6])


def test_rank_and_world_come_from_torchruns_environment(
    data: LaunchData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with open_small(data.own) as loader:
        assert (loader.schedule.rank, loader.schedule.world_size, len(loader)) == (1, 3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` = 0"),
        ({"batch_size": 13}, "12 samples, fewer than the 13 of one step .* lower `batch_size`"),
        ({"num_frames": 0}, "`num_frames` = 0"),
        ({"decoder": "nvdec"}, "`decoder` = 'nvdec' is not a decoder; choose one of auto, dali, cpu-fused"),
        ({"context_length": 1}, r"`context_length` = 1 is not allowed; it must be 0 for no tokens, or in \[2"),
        ({"context_length": 10**9}, "`context_length` = 1000000000 .* < 1025"),
        ({"crop": "middle"}, "`crop` = 'middle' is not a crop rule; choose one of random-resized"),
        ({"crop": "centre"}, "`crop` = 'centre' is now called center"),
        ({"sampling": "uniform"}, "`sampling` = 'uniform'"),
        ({"rank": 2, "world_size": 2}, "`rank` = 2"),
        ({"world_size": 2}, "both `rank` and `world_size`"),
        ({"prefetch_batches": 0}, "`prefetch_batches` = 0"),
        ({"num_frames": "4"}, "`num_frames` = '4' .* a whole number"),
        ({"num_frames": 2.0}, "`num_frames` = 2.0 .* a whole number"),
        ({"workers": True}, "`workers` = True .* a whole number"),
        ({"crop_scale": (0.5,)}, r"`crop_scale` = \(0.5,\) .* two finite numbers"),
        ({"crop_ratio": (1, float("inf"))}, "`crop_ratio` = .* two finite numbers"),
        ({"flip_probability": None}, "`flip_probability` = None .* a finite number"),
        ({"eval_crops": 3.0}, "`eval_crops` = 3.0 .* 1 or 3"),
        ({"batch_size": 2.0}, "`batch_size` = 2.0 .* a whole number >= 1"),
        ({"seed": -1}, "`seed` = -1 .* a whole number >= 0"),
        ({"training": "no"}, "`training` = 'no' .* True or False"),
        ({"device": "gpu"}, "`device` = 'gpu' cannot be used here"),
        ({"context_length": -1}, "`context_length` = -1"),
        ({"quarantine": 3}, "`quarantine` = 3"),
        ({"pool": 3}, "`pool` = 3"),
    ],
)
def test_errors_name_parameters_of_the_call(data: LaunchData, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_small(data.own, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"manifest": None}, "`manifest` = None"),
        ({"num_frames": None}, "`num_frames` = None"),
        ({"seed": 1.5}, "`seed` = 1.5"),
        ({"max_bad_fraction": float("nan")}, "`max_bad_fraction` = nan"),
    ],
)
def test_errors_of_a_dataset_name_its_parameters(
    data: LaunchData, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        avion_dali.ClipDataset(**{"manifest": data.own, **SMALL, **options})
    with pytest.raises(UserError, match="`epoch` = -1"):
        avion_dali.ClipDataset(data.own, **SMALL).set_epoch(-1)


def test_numpys_numbers_are_as_good(data: LaunchData) -> None:
    counts = {name: np.int64(value) for name, value in SMALL.items()}
    ours, other = avion_dali.ClipDataset(data.own, **SMALL), avion_dali.ClipDataset(data.own, **counts)
    assert torch.equal(ours[0]["frames"], other[np.int64(0)]["frames"])


def test_threads_may_share_a_dataset(data: LaunchData) -> None:
    dataset = avion_dali.ClipDataset(data.own, **SMALL)
    alone = [dataset[i]["frames"] for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: dataset[i % 12]["frames"], range(48)))
    assert all(torch.equal(frames, alone[i % 12]) for i, frames in enumerate(found))


def test_an_option_that_does_not_exist_is_a_type_error(data: LaunchData) -> None:
    with pytest.raises(TypeError, match=r"ClipDataset\(\) has no keyword workers"):
        avion_dali.ClipDataset(data.own, workers=1)
    with pytest.raises(TypeError, match=r"open_clips\(\) has no keyword num_frame"):
        open_small(data.own, num_frame=3)


def test_no_process_is_left_when_a_loader_is_closed_or_forgotten(data: LaunchData) -> None:
    code = (
        "import avion_dali, sys\n"
        "if __name__ == '__main__':\n"
        "    loader = avion_dali.open_clips(sys.argv[1], batch_size=2, num_frames=2, frame_size=32,\n"
        "        workers=1, decoder='cpu-fused', device='cpu')\n"
        "    print(next(iter(loader)).frames_BTHWC.shape)\n"
    )
    script = data.folder / "forgets.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(data.own)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "torch.Size([2, 2, 32, 32, 3])\n"), done.stderr
    assert done.stderr == ""


def test_a_loader_that_is_dropped_ends_its_processes(data: LaunchData) -> None:
    loader = open_small(data.own)
    next(iter(loader))
    processes = [worker.process for worker in loader._pool._supervisor._workers]
    assert all(process.is_alive() for process in processes) and processes
    del loader
    gc.collect()
    for process in processes:
        process.join(timeout=20)
        assert not process.is_alive()


def test_steps_move_the_position_of_the_loader(data: LaunchData) -> None:
    with open_small(data.own) as loader:
        steps = loader.batches(8, 12)
        assert loader.state_dict()["epoch"] == 1
        assert [batch.epoch for batch in steps] == [1, 1, 1, 1]
        assert {batch.epoch for batch in loader} == {2}


def test_a_manifest_and_a_dataset_survive_pickling(data: LaunchData, tmp_path: Path) -> None:
    moved = Manifest(data.own, chunk_root=tmp_path)
    again = pickle.loads(pickle.dumps(moved))
    assert (again.folder, again.chunk_root) == (moved.folder.absolute(), str(tmp_path))
    assert again.sample(3) == moved.sample(3) and again.chunk(0) == moved.chunk(0)
    dataset = avion_dali.ClipDataset(data.own, **SMALL)
    dataset.set_epoch(4)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[5]["frames"], dataset[5]["frames"])


@pytest.mark.parametrize("start_method", ["spawn", "forkserver", "fork"])
def test_torchs_dataloader_delivers_the_same_under_every_start_method(
    data: LaunchData, start_method: str
) -> None:
    dataset = avion_dali.ClipDataset(data.own, **SMALL)
    loader = DataLoader(
        dataset, batch_size=3, num_workers=1, multiprocessing_context=start_method, persistent_workers=True
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        frames = torch.cat([batch["frames"] for batch in loader])
        assert torch.equal(frames, torch.stack([dataset[i]["frames"] for i in range(12)]))
    del loader


def test_a_dataset_replaces_what_cannot_be_read_and_stops_when_that_is_too_much(
    data: LaunchData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = Manifest(data.own, chunk_root=tmp_path)
    with pytest.raises(UserError, match="could not be read"):
        avion_dali.ClipDataset(elsewhere, max_bad_fraction=0.0, **SMALL)[0]
    evaluation = avion_dali.ClipDataset(elsewhere, training=False, **SMALL)[0]
    assert not evaluation["valid"] and not evaluation["frames"].any()
    assert "missing" in caplog.text
    dali = {"decoder": "dali", **SMALL}
    with pytest.raises(UserError, match="`decoder` = 'nvdec' is not a decoder; choose one of cpu-fused, paper"):
        avion_dali.ClipDataset(data.own, **dali | {"decoder": "nvdec"})
    with pytest.raises(UserError, match="`decoder` = 'dali' does not run in the processes of a DataLoader"):
        avion_dali.ClipDataset(data.own, **dali)
    with pytest.raises(IndexError):
        avion_dali.ClipDataset(data.own, **SMALL)[12]


def test_a_dataset_takes_the_same_substitutes_as_the_loader(data: LaunchData, tmp_path: Path) -> None:
    """Of three videos one is missing."""
    root = tmp_path / "chunks"
    for chunk in data.chunks.rglob("*.mp4"):
        target = root / chunk.relative_to(data.chunks)
        target.parent.mkdir(parents=True)
        if "P02" not in str(chunk):
            target.symlink_to(chunk)
    manifest = Manifest(data.own, chunk_root=root)
    dataset = avion_dali.ClipDataset(manifest, max_bad_fraction=1.0, **SMALL)
    with open_small(manifest, max_bad_fraction=1.0) as loader:
        found = {}
        for number, batch in enumerate(loader):
            _, planned = loader.schedule.micro_batch_ids(number, 0)
            pairs = zip(planned.tolist(), batch.sample_ids.tolist(), batch.frames_BTHWC, strict=True)
            found |= {row: (sample, frames) for row, sample, frames in pairs}
    assert any(row != sample for row, (sample, _) in found.items())
    for row, (sample, frames) in found.items():
        item = dataset[row]
        assert item["sample_id"] == sample
        np.testing.assert_array_equal(item["frames"].numpy(), frames.numpy())


@pytest.mark.parametrize(
    ("example", "arguments", "said"),
    [
        ("own_loop", ["--checkpoint", "{folder}/own.pt", "--epochs", "2"], "epoch 1: loss "),
        ("torch_dataloader", [], "epoch 1: frames (8, 4, 64, 64, 3) torch.uint8, texts (8, 77)"),
        ("lightning_module", ["--epochs", "1"], "loss 0."),
    ],
)
def test_the_examples_run(
    data: LaunchData, tmp_path: Path, example: str, arguments: list[str], said: str
) -> None:
    more = [argument.format(folder=tmp_path) for argument in arguments]
    done = subprocess.run(
        [sys.executable, f"examples/{example}.py", str(data.own), *more],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
