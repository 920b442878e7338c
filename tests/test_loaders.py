"""Which decoder a run takes, what it says of it, and what it refuses before any work is done."""

import sys
from pathlib import Path

import make_videos
import pytest
import torch
from dali_clips import VP9, chunk_manifest

from avion_dali.assembly import decoder_choice, open_clips
from avion_dali.assembly.dali_room import pipelines_module
from avion_dali.assembly.open_clips import chunk_codecs
from avion_dali.cli import pretrain
from avion_dali.cli.demo import chunk_profile
from avion_dali.contracts import UserError
from avion_dali.engine.run_log import read_rows
from avion_dali.locks import LOCK_FILE

SECONDS = tuple(i / 10 for i in range(11))
HOW = {"frames": 60, "size": (64, 48)}

TRAINING = [
    *("--decoder", "dali", "--data.num_frames", "2", "--data.frame_size", "32", "--data.workers", "1"),
    *("--model.size", "tiny", "--model.embed_dim", "32", "--model.context_length", "8", "--run.max_steps", "3"),
    *("--optim.global_batch", "8", "--optim.micro_batch", "4", "--optim.learning_rate", "1e-3"),
    *("--run.log_every", "1"),
]


def test_a_training_says_which_decoder_and_why(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    path = make_videos.write_video(tmp_path / "a.mp4", **HOW, **VP9)
    manifest = chunk_manifest(tmp_path / "m", {path: SECONDS})
    folders = ["--data.train_manifest", str(manifest.folder), "--data.eval_manifest", str(manifest.folder)]
    pretrain.main([*TRAINING, *folders, "--output-dir", str(tmp_path)])
    header, *rows = read_rows(tmp_path / "log.jsonl")
    assert (header["decoder"], header["decoder_reason"]) == ("dali", "asked for")
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["decoder"] for row in trained] == ["dali"] * 3
    assert [row["decoded_on_cpu"] for row in trained] == [0] * 3
    assert [row["clips"] for row in rows if row["kind"] == "evaluation"] == [11, 11, 11]


def test_h264_without_a_gpu_is_refused_before_training(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    paths = [
        make_videos.write_video(tmp_path / "a.mp4", **HOW),
        make_videos.write_video(tmp_path / "b.mp4", **HOW, **VP9),
    ]
    manifest = chunk_manifest(tmp_path / "m", dict.fromkeys(paths, SECONDS))
    assert chunk_codecs(manifest) == {"h264", "vp9"}
    arguments = ["--data.train_manifest", str(manifest.folder), "--output-dir", str(tmp_path / "run")]
    with pytest.raises(UserError) as caught:
        pretrain.main([*TRAINING, *arguments])
    for words in ("h264 chunks", "--decoder cpu-fused", "avion-dali chunk --profile vp9", str(manifest.folder)):
        assert words in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]  # nothing was begun


CUDA = torch.device("cuda", 1)
SUPPORT = pipelines_module("support")
NO_DRIVER = "no libnvcuvid.so.1"


def test_without_nvdec_dali_is_refused_and_auto_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(SUPPORT, "nvdec_problem", lambda index: asked.append(index) or "no libnvcuvid.so.1")
    with pytest.raises(UserError, match=r"no libnvcuvid.so.1; `decoder` cpu-fused"):
        decoder_choice.choose_decoder("dali", CUDA)
    choice = decoder_choice.choose_decoder("auto", CUDA)
    assert (choice.name, choice.reason) == ("cpu-fused", "no libnvcuvid.so.1")
    assert asked == [1, 1]


def test_with_nvdec_auto_takes_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SUPPORT, "nvdec_problem", lambda index: None)
    choice = decoder_choice.choose_decoder("auto", CUDA)
    assert choice.name == "dali"
    assert "NVDEC" in choice.reason
    assert decoder_choice.choose_decoder("dali", CUDA).name == "dali"
    cpu = decoder_choice.choose_decoder("auto", torch.device("cpu"))
    assert cpu.name == "cpu-fused"
    assert cpu.reason


def test_without_dali_only_its_own_option_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipelines.dali_strategy", None)
    monkeypatch.setattr(SUPPORT, "dali_problem", lambda: "DALI is not installed; pip install it")
    with pytest.raises(UserError, match="DALI is not installed; pip install it; `decoder` cpu-fused"):
        decoder_choice.choose_decoder("dali", torch.device("cpu"))
    for name in ("cpu-fused", "paper-fused", "reference"):
        assert decoder_choice.choose_decoder(name, torch.device("cpu")).name == name


def test_the_demo_makes_chunks_that_its_decoder_reads_without_a_gpu() -> None:
    assert chunk_profile("dali") == "vp9"
    assert chunk_profile("cpu-fused") == chunk_profile("auto") == "balanced"


def test_a_decoder_without_a_strategy_is_no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = decoder_choice.DecoderChoice("nvjpeg", "asked for")
    monkeypatch.setattr(open_clips, "choose_decoder", lambda *_: chosen)
    with pytest.raises(UserError, match="`decoder` = 'nvjpeg' has no strategy"):
        open_clips._open_strategy("nvjpeg", None, None, schedule=None, device=CUDA, dali=None)
