"""The command line is a promise: what it accepts is written down here."""

import argparse
import dataclasses
import json
from operator import attrgetter
from pathlib import Path

import make_videos
import pytest

from avion_dali.cli import features
from avion_dali.cli.arguments import parse_options
from avion_dali.cli.main import build_parser, main
from avion_dali.config import EvaluateConfig, TrainConfig
from avion_dali.contracts import UserError
from avion_dali.data.finding import find_videos
from avion_dali.data.manifest import Manifest

TRAIN_OPTIONS = {
    "": "output_dir decoder resume",
    "data": "train_manifest eval_manifest num_frames frame_size sampling stride crop crop_scale crop_ratio "
    "flip_probability repeats eval_clips eval_crops text relevancy_threshold normalization workers "
    "prefetch_batches clip_timeout_s max_bad_fraction",
    "augment": "color_jitter rand_augment_ops rand_augment_magnitude erasing_probability",
    "model": "encoder size weights temporal_resize embed_dim activation norm_eps pre_norm context_length "
    "drop_path drop_path_schedule patch_dropout attention checkpoint_every compile train_logit_scale",
    "objective": "name contrastive max_margin classification masked_video",
    "objective.contrastive": "local_loss",
    "objective.max_margin": "loss margin relaxation",
    "objective.classification": "dropout label_smoothing mixup cutmix mix_probability switch_probability",
    "objective.masked_video": "mask_ratio decoder_depth normalize_target",
    "optim": "optimizer global_batch micro_batch epochs learning_rate rate_batch schedule warmup_epochs "
    "warmup_learning_rate final_learning_rate layer_decay weight_decay beta1 beta2 eps clip_grad_norm "
    "ema_decay",
    "run": "seed precision sharding log_every eval_every save_every save_minutes keep_last spike_factor "
    "on_spike max_steps",
}
EVALUATE_OPTIONS = (
    "checkpoint manifest decoder workers micro_batch num_frames eval_clips eval_crops frozen_frames output "
    "output_dir"
)
COMMANDS = {
    "chunk": "--output --profile --chunk-seconds --short-side --max-fps --jobs --root",
    "manifest captions": "--chunks --annotations --output --skip-bad-rows --jobs --chunk-names "
    "--chunk-seconds --classes-from",
    "manifest ego4d": "--chunks --annotations --output --skip-bad-rows --jobs --chunk-names --chunk-seconds",
    "manifest ek100": "--chunks --annotations --output --skip-bad-rows --jobs --chunk-names --chunk-seconds "
    "--task --classes-from --sentences --relevancy",
    "manifest kinetics": "--annotations --output --skip-bad-rows --jobs --chunk-names --chunk-seconds --videos "
    "--chunks --class-names",
    "check": "--deep --jobs --timeout --output --repair-manifest",
    "plan": "--videos --chunks --profiles --chunk-seconds --short-side --hours --frames --clip-seconds "
    "--frame-size --global-batch --step-seconds --model --micro-batch --processes --workers --disk --seconds",
    "weights": "--output --to",
    "features": "--checkpoint --manifest --output --clip-seconds --num-frames --eval-clips --eval-crops "
    "--before-projection --decoder --workers --micro-batch",
    "env": "--json",
    "demo": "--output-dir --decoder",
}


def names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def subcommands(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                found |= subcommands(child, f"{prefix} {name}".strip())
    options = [o for a in parser._actions for o in a.option_strings if o not in ("-h", "--help")]
    return found or {prefix: options}


def test_options_of_training_and_evaluation() -> None:
    config = TrainConfig()
    sections = {name: names(type(attrgetter(name)(config))) for name in TRAIN_OPTIONS if name}
    top = [name for name in names(TrainConfig) if name not in sections]
    assert {"": top} | sections == {section: text.split() for section, text in TRAIN_OPTIONS.items()}
    assert names(EvaluateConfig) == EVALUATE_OPTIONS.split()


def test_subcommands_and_their_options() -> None:
    assert subcommands(build_parser()) == {name: text.split() for name, text in COMMANDS.items()}


def test_dashes_and_underscores_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {num_frames: 8, crop_scale: [0.3, 0.9]}\nrun: {seed: 3}\n")
    argv = ["--config", str(tmp_path / "a.yaml"), "--output-dir", "x-y", "--data.num-frames=6"]
    config = parse_options(TrainConfig, argv, prog="p", description="d")
    assert (config.output_dir, config.data.num_frames, config.data.crop_scale) == ("x-y", 6, (0.3, 0.9))
    assert config.run.seed == 3


def test_abbreviations_are_refused() -> None:
    with pytest.raises(UserError, match="output_di"):
        parse_options(TrainConfig, ["--output_di", "x"], prog="p", description="d")


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--model.sizee=tiny", "model has: encoder, size,"),
        ("--objective.contrastive.locl_loss=true", "objective.contrastive has: local_loss"),
        ("--modl.size=tiny", "top-level keys are: output_dir,"),
    ],
)
def test_an_unknown_key_is_answered_with_the_keys_of_its_section(argument: str, told: str) -> None:
    for argv in ([argument], argument.split("=")):
        with pytest.raises(UserError) as error:
            parse_options(TrainConfig, argv, prog="p", description="d")
        assert told in str(error.value) and argv[0] in str(error.value)


def test_help_speaks_to_its_reader(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (main, features.main):
        with pytest.raises(SystemExit):
            command(["--help"])
        shown = capsys.readouterr().out
        assert "usage:" in shown and "re-import" not in shown and "Light" not in shown


def test_chunk_then_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    make_videos.write_video(videos / "good.mp4", frames=45, size=(64, 48))
    (videos / "text.mp4").write_text("no video")
    assert main(["chunk", str(videos), "--output", str(tmp_path / "chunks"), "--chunk-seconds", "1"]) == 1
    out, err = capsys.readouterr()
    assert "1 of 2 videos done: 2 chunks made, 0 kept" in out
    assert "text.mp4" in err
    assert (tmp_path / "chunks" / "good.mp4" / "1.mp4").exists()
    rows = [{"video": "good", "start": 0.5, "end": 1.2, "text": "look"}, {"video": "bad", "start": 0, "end": 1}]
    annotations = tmp_path / "captions.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build = ["manifest", "captions", "--chunks", str(tmp_path / "chunks"), "--annotations", str(annotations)]
    build += ["--output", str(tmp_path / "m")]
    with pytest.raises(UserError, match="--skip-bad-rows"):
        main(build)
    assert main([*build, "--skip-bad-rows"]) == 0
    assert "1 clips over 2 chunks" in capsys.readouterr().out
    assert Manifest(tmp_path / "m").sample(0).num_chunks == 2


def test_folders_are_searched_and_empty_ones_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "out").mkdir()
    for name in ("a/2.MP4", "a/b/1.mkv", "a/notes.txt", "a/out/v.mp4"):
        (tmp_path / name).touch()
    sources = [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "x.mp4"]
    videos, passed_over = find_videos(sources, but_not=tmp_path / "a" / "out")
    assert [p.name for p in videos] == ["2.MP4", "1.mkv", "x.mp4"]
    assert [p.name for p in passed_over] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no video"):
        find_videos([tmp_path / "empty"], but_not=tmp_path / "out")
