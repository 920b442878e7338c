"""Every range is checked where it is written, and the message names the key."""

import json
from dataclasses import asdict, fields, is_dataclass

import pytest

from avion_dali import config
from avion_dali.config import DataConfig, EvaluateConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from avion_dali.contracts import UserError

SECTIONS = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "run": RunConfig}
NAN = float("nan")
BAD = [
    ("data", "num_frames", 0),
    ("data", "frame_size", 15),
    ("data", "crop_scale", (0.0, 1.0)),
    ("data", "crop_scale", (0.8, 0.5)),
    ("data", "crop_scale", (0.5, 1.1)),
    ("data", "crop_scale", (NAN, 1.0)),
    ("data", "crop_ratio", (0.0, 1.0)),
    ("data", "crop_ratio", (2.0, 1.0)),
    ("data", "flip_probability", 1.5),
    ("data", "flip_probability", -0.1),
    ("data", "flip_probability", NAN),
    ("data", "workers", -1),
    ("data", "prefetch_batches", 0),
    ("data", "clip_timeout_s", 0.0),
    ("data", "max_bad_fraction", 1.01),
    ("data", "max_bad_fraction", -0.01),
    ("model", "embed_dim", 0),
    ("model", "norm_eps", -1.0),
    ("model", "context_length", 1),
    ("model", "context_length", 78),
    ("model", "drop_path", 1.0),
    ("model", "drop_path", -0.1),
    ("model", "patch_dropout", 1.0),
    ("optim", "micro_batch", 0),
    ("optim", "global_batch", 0),
    ("optim", "epochs", 0),
    ("optim", "learning_rate", 0.0),
    ("optim", "learning_rate", NAN),
    ("optim", "warmup_epochs", 6.0),
    ("optim", "warmup_epochs", -1.0),
    ("optim", "weight_decay", -0.1),
    ("optim", "beta1", 1.0),
    ("optim", "beta2", -0.1),
    ("optim", "clip_grad_norm", -1.0),
    ("run", "seed", -1),
    ("run", "seed", 2**63),
    ("run", "log_every", 0),
    ("run", "eval_every", 0),
    ("run", "save_every", -1),
    ("run", "max_steps", -1),
]


@pytest.mark.parametrize(("section", "key", "value"), BAD)
def test_a_bad_value_is_refused_by_its_key(section: str, key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^({section}\.{key}|`{key}`) = .*must be"):
        SECTIONS[section](**{key: value})


def test_a_warm_up_beyond_the_end_is_told_where_the_end_is() -> None:
    with pytest.raises(UserError, match=r"warmup_epochs = 2\.0 .* optim\.epochs is 1$"):
        OptimConfig(epochs=1, warmup_epochs=2.0)


@pytest.mark.parametrize("key", ["eps", "warmup_learning_rate", "final_learning_rate"])
def test_negative_optimizer_values_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"optim\.{key}"):
        OptimConfig(**{key: -1e-3})


@pytest.mark.parametrize(("key", "value"), [("workers", -1), ("micro_batch", 0)])
def test_evaluation_values_are_checked(key: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"{key} = {value}"):
        EvaluateConfig(checkpoint="x", **{key: value})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "num_frames", 1),
        ("data", "frame_size", 16),
        ("data", "crop_scale", (1.0, 1.0)),
        ("data", "crop_ratio", (1.0, 1.0)),
        ("data", "flip_probability", 1.0),
        ("data", "max_bad_fraction", 0.0),
        ("model", "context_length", 2),
        ("model", "context_length", 77),
        ("optim", "warmup_epochs", 5.0),
        ("optim", "weight_decay", 0.0),
        ("run", "seed", 2**63 - 1),
    ],
)
def test_the_ends_of_a_range_are_allowed(section: str, key: str, value: object) -> None:
    assert getattr(SECTIONS[section](**{key: value}), key) == value


def test_defaults_are_the_published_recipe() -> None:
    default = TrainConfig()
    assert (default.data.crop_scale, default.data.num_frames) == ((0.5, 1.0), 4)
    assert default.data.crop_ratio == pytest.approx((3 / 4, 4 / 3))
    assert (default.model.embed_dim, default.model.context_length) == (256, 77)
    assert not default.model.train_logit_scale


def test_plain_values_round_trip_through_json() -> None:
    written = TrainConfig(
        output_dir="runs/x",
        decoder="cpu-fused",
        data=DataConfig(crop_scale=(0.3, 0.9), num_frames=16),
        optim=OptimConfig(beta2=0.98, warmup_epochs=1.5),
        run=RunConfig(seed=2**62 + 1),
    )
    read = TrainConfig.from_plain(json.loads(json.dumps(asdict(written))))
    assert read == written
    assert read.data.crop_scale == (0.3, 0.9)
    assert hash(read) == hash(written)


def test_absent_keys_take_the_defaults() -> None:
    assert TrainConfig.from_plain({}) == TrainConfig()
    assert TrainConfig.from_plain({"data": {"num_frames": 8}}) == TrainConfig(data=DataConfig(num_frames=8))


@pytest.mark.parametrize("values", [{"decodr": "dali"}, {"data": {"num_frame": 4}}, {"run": {"workers": 4}}])
def test_unknown_keys_are_refused_by_name(values: dict) -> None:
    section = next(iter(values.values()))
    key = next(iter(section)) if isinstance(section, dict) else next(iter(values))
    with pytest.raises(UserError, match=key):
        TrainConfig.from_plain(values)


def test_plain_values_are_checked_too() -> None:
    with pytest.raises(UserError, match=r"`num_frames` = 0"):
        TrainConfig.from_plain({"data": {"num_frames": 0}})


@pytest.mark.parametrize("kind", [c for c in vars(config).values() if is_dataclass(c)])
def test_every_field_is_documented(kind: type) -> None:
    documented = "".join(base.__doc__ or "" for base in kind.__mro__)
    assert [f.name for f in fields(kind) if f"\n        {f.name}: " not in documented] == []


def test_a_mode_of_compilation_needs_compilation() -> None:
    mode = "max-autotune-no-cudagraphs"
    with pytest.raises(
        UserError, match=r"compile_mode = max-autotune-no-cudagraphs needs model\.compile = true"
    ):
        ModelConfig(compile_mode=mode)
    assert ModelConfig(compile=True, compile_mode=mode).compile_mode == mode
