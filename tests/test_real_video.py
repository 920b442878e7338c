"""The whole way with videos like those that people film."""

import json
from pathlib import Path

from test_reading import assert_exact

from avion_dali.cli import evaluate, pretrain
from avion_dali.cli import main as cli
from avion_dali.engine.run_log import read_rows


def test_chunk_manifest_twenty_steps_evaluation(lifelike_video: Path, tmp_path: Path) -> None:
    chunks, captions = tmp_path / "chunks", tmp_path / "captions.csv"
    assert (
        cli.main(
            ["chunk", str(lifelike_video), "--output", str(chunks), "--chunk-seconds", "5"]
            + ["--short-side", "144"]
        )
        == 0
    )
    lines = ["video,start,end,text"]
    name = lifelike_video.stem
    lines += [f"{name},{start},{start + 1.5},clip {start} of {name}" for start in range(8)]
    captions.write_text("\n".join(lines) + "\n")
    manifest = tmp_path / "m"
    assert (
        cli.main(
            ["manifest", "captions", "--chunks", str(chunks), "--annotations", str(captions)]
            + ["--output", str(manifest)]
        )
        == 0
    )
    run = tmp_path / "run"
    pretrain.main(
        ["--decoder", "cpu-fused", "--data.train_manifest", str(manifest), "--output-dir", str(run)]
        + [
            "--data.frame_size",
            "32",
            "--data.num_frames",
            "2",
            "--model.size",
            "tiny",
            "--model.embed_dim",
            "32",
        ]
        + ["--model.context_length", "16", "--optim.global_batch", "8", "--optim.micro_batch", "8"]
        + ["--optim.learning_rate", "1e-4", "--optim.epochs", "20", "--run.max_steps", "20"]
    )
    assert [row["step"] for row in read_rows(run / "log.jsonl") if row["kind"] == "train"][-1] == 20
    output = tmp_path / "metrics.json"
    evaluate.main(
        ["--checkpoint", str(run / "checkpoint.pt"), "--manifest", str(manifest), "--output", str(output)]
    )
    metrics = json.loads(output.read_text())
    assert metrics["clips"] == 8
    assert metrics["unreadable"] == 0


def test_frames_equal_sequential_decoding(lifelike_video: Path) -> None:
    assert_exact(lifelike_video, seed=3)
