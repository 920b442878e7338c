"""The command line is a promise: what it accepts is written down here."""

import argparse
import dataclasses
import json
import re
from operator import attrgetter
from pathlib import Path

import make_videos
import pytest

from avion_dali.cli.arguments import parameters_as_keys, parse_options
from avion_dali.cli.demo import DemoOptions
from avion_dali.cli.demo_finetune import FinetuneDemoOptions
from avion_dali.cli.main import SUBCOMMANDS, build_parser, main
from avion_dali.cli.slurm import SlurmOptions
from avion_dali.config import EvaluateConfig, TrainConfig
from avion_dali.config.recipe_files import recipe_names, recipes_folder
from avion_dali.contracts import UserError
from avion_dali.data.finding import find_videos
from avion_dali.data.manifest import Manifest

TRAIN_OPTIONS = {
    "": "output_dir decoder resume",
    "dali": "graphs threads blocking_sync",
    "data": "num_frames frame_size sampling stride crop crop_scale crop_ratio flip_probability repeats "
    "eval_clips eval_crops text relevancy_threshold workers worker_niceness prefetch_batches "
    "clip_timeout_s max_bad_fraction train_manifest eval_manifest normalization",
    "augment": "color_jitter rand_augment_ops rand_augment_magnitude erasing_probability",
    "model": "encoder size weights temporal_resize embed_dim activation norm_eps pre_norm context_length "
    "drop_path drop_path_schedule patch_dropout attention residual_dtype mlp_dtype checkpoint_every compile "
    "compile_mode train_logit_scale",
    "objective": "name contrastive max_margin classification masked_video",
    "objective.contrastive": "local_loss",
    "objective.max_margin": "loss margin relaxation",
    "objective.classification": "dropout label_smoothing mixup cutmix mix_probability switch_probability",
    "objective.masked_video": "mask_ratio decoder_depth normalize_target",
    "optim": "optimizer global_batch micro_batch epochs learning_rate rate_batch schedule warmup_epochs "
    "warmup_learning_rate final_learning_rate layer_decay weight_decay beta1 beta2 eps clip_grad_norm "
    "ema_decay",
    "run": "seed precision sharding sharding_dtype log_every eval_every save_every save_minutes keep_last "
    "spike_factor on_spike max_steps",
}
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
    "recipes": "",
}
CONFIGURED = {
    "evaluate": (
        EvaluateConfig,
        "checkpoint manifest decoder dali workers micro_batch num_frames eval_clips eval_crops frozen_frames "
        "output output_dir",
    ),
    "slurm": (
        SlurmOptions,
        "nodes gpus_per_node cpus_per_process memory_gb time stretches partition account name log_dir cluster",
    ),
    "demo": (DemoOptions, "output_dir decoder"),
    "demo-finetune": (FinetuneDemoOptions, "demo_dir output_dir decoder"),
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
    for kind, text in CONFIGURED.values():
        assert names(kind) == text.split()


def test_subcommands_and_their_options() -> None:
    with_settings = dict.fromkeys(("pretrain", "finetune", *CONFIGURED), "")
    assert subcommands(build_parser()) == {
        name: text.split() for name, text in (COMMANDS | with_settings).items()
    }


def options_shown(capsys: pytest.CaptureFixture[str], command: str) -> set[str]:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: avion-dali {command} ")
    return set(re.findall(r"^  --([\w.]+)", shown, re.MULTILINE))


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_the_help_of_a_training_shows_all_settings(capsys: pytest.CaptureFixture[str], command: str) -> None:
    settings = {f"{s}.{name}".lstrip(".") for s, text in TRAIN_OPTIONS.items() for name in text.split()}
    assert settings <= options_shown(capsys, command)


@pytest.mark.parametrize("command", CONFIGURED)
def test_the_help_of_other_commands_shows_all_settings(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert set(CONFIGURED[command][1].split()) <= options_shown(capsys, command)


def test_a_missing_and_a_wrong_command_are_answered_with_all_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for argv in ([], ["pretrian"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 2
    assert re.search("choose from .*pretrain", capsys.readouterr().err)


def test_a_recipe_is_found_by_name_and_a_file_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for named in ("pretrain_tiny", "pretrain_tiny.yaml", "configs/pretrain_tiny.yaml"):
        for argv in (["--config", named], [f"--config={named}"]):
            assert parse_options(TrainConfig, argv, prog="p", description="d").model.size == "tiny"
    (tmp_path / "configs").mkdir()
    for own in (tmp_path / "pretrain_tiny.yaml", tmp_path / "configs" / "pretrain_tiny.yaml"):
        own.write_text("run: {seed: 7}\n")
        named = str(own.relative_to(tmp_path))
        assert parse_options(TrainConfig, ["--config", named], prog="p", description="d").run.seed == 7
    for missing in ("pretrain_tinny", "elsewhere/pretrain_tiny.yaml", "configs/pretrain_tiny.yml"):
        with pytest.raises(UserError, match=f"--config {missing}: .*recipes are: demo, .*, pretrain_tiny, "):
            parse_options(TrainConfig, ["--config", missing], prog="p", description="d")
    (tmp_path / "pretrain_tiny.yaml").unlink()
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}\n    " in listed for name in recipe_names()) and listed.count("Hardware: ") == len(
        recipe_names()
    )
    assert main(["recipes", "pretrain_tiny"]) == 0
    assert capsys.readouterr().out == (recipes_folder() / "pretrain_tiny.yaml").read_text()


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
    for argv in (["--help"], *([name, "--help"] for name in SUBCOMMANDS)):
        with pytest.raises(SystemExit):
            main(argv)
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
    with pytest.raises(UserError, match="empty contains no video"):
        find_videos([tmp_path / "empty"], but_not=tmp_path / "out")


def test_errors_name_keys_and_options_where_the_library_names_parameters() -> None:
    def translated(message: str, options: type) -> str:
        with pytest.raises(UserError) as caught, parameters_as_keys(options):
            raise UserError(message)
        return str(caught.value)

    message = "`num_frames` and `decoder` do not fit `other` and `avion-dali chunk`"
    assert translated(message, TrainConfig) == (
        "data.num_frames and --decoder do not fit `other` and `avion-dali chunk`"
    )
    assert translated(message, EvaluateConfig).startswith("--num-frames and --decoder do not")
