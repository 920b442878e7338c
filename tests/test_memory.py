"""The memory of a step is counted right, and settings follow from it: those of the paper on a GPU of 24 GB."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from launch_data import CONFIGS, recipe_config
from test_objectives_train import FRAMES, KEY, SIDE, make_batch, make_case

from avion_dali.assembly.memory import (
    GIB,
    SMALL_CARD_BYTES,
    MemoryPlan,
    count_parameters,
    kept_bytes,
    plan_memory,
)
from avion_dali.assembly.resolve import resolve
from avion_dali.config import (
    DataConfig,
    MaskedVideoConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
)
from avion_dali.contracts import UserError
from avion_dali.engine.distributed import Distributed

CASES = [
    ("vit", "contrastive"),
    ("vit", "classification"),
    ("timesformer", "classification"),
    ("videomae", "classification"),
    ("videomae", "masked-video"),
]
H100, H200 = int(74.5 * GIB), int(132 * GIB)  # free there, less the reserve


def tiny_config(encoder: str, name: str) -> TrainConfig:
    """The configuration of `make_case`."""
    return TrainConfig(
        data=DataConfig(num_frames=FRAMES, frame_size=SIDE),
        model=ModelConfig(encoder=encoder, size="tiny", context_length=8, embed_dim=32),
        objective=ObjectiveConfig(name=name, masked_video=MaskedVideoConfig(mask_ratio=0.5, decoder_depth=1)),
    )


def counted_bytes(encoder: str, name: str, *, checkpoint_every: int, precision: str) -> float:
    """What autograd keeps for one clip more: every piece of memory once, without the parameters."""
    model, objective = make_case(encoder, name, checkpoint_every=checkpoint_every)
    counted = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []  # kept alive, so that no address is reused

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in counted:
            counted.add(tensor.untyped_storage().data_ptr())
            kept.append(tensor)
        return tensor

    totals = []
    for clips in (2, 6):
        kept.clear()
        half = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), half:
            outputs = objective.outputs(model, make_batch(0, clips), KEY)
        totals.append(sum(tensor.untyped_storage().nbytes() for tensor in kept))
        counted -= {tensor.untyped_storage().data_ptr() for tensor in kept}
        del outputs
    return (totals[1] - totals[0]) / 4


@pytest.mark.parametrize("checkpoint_every", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("encoder", "name"), CASES)
def test_the_count_is_what_autograd_keeps(
    encoder: str, name: str, precision: str, checkpoint_every: int
) -> None:
    options = {"checkpoint_every": checkpoint_every, "precision": precision}
    counted = counted_bytes(encoder, name, **options)
    assert kept_bytes(tiny_config(encoder, name), **options) == pytest.approx(counted, rel=0.15)


PARAMETERS = {"vit_b16": 150_000_000, "vit_l14": 428_000_000}  # of dual encoders


def planned(config: TrainConfig, *, free: int, ranks: int = 8) -> MemoryPlan:
    parameters = PARAMETERS[config.model.size]
    return plan_memory(config, precision="bf16", ranks=ranks, free=free, parameters=parameters)


AUTO = {
    # Recipe: micro-batch, and recomputation on GPUs of 24, 80 and 141 GB.
    "pretrain_vitb16_ego4d": (256, (1, 0, 0)),
    "pretrain_vitb16_ego4d_llm": (256, (1, 0, 0)),
    "pretrain_vitl14_ego4d_llm": (112, (1, 1, 0)),
    "finetune_mir_vitb16": (64, (1, 0, 0)),
    "finetune_mir_vitl14": (24, (1, 1, 0)),
    "finetune_cls_vitb16": (64, (1, 0, 0)),
    "finetune_cls_vitl14": (24, (1, 1, 0)),
}


def test_recipes_are_the_papers_on_24_gb_and_do_not_recompute_for_it_on_larger_gpus() -> None:
    automatic = {p.stem for p in CONFIGS.glob("*.yaml") if "checkpoint_every: auto" in p.read_text()}
    assert automatic == {*AUTO, "pretrain_own"}  # which leaves its micro-batch open as well
    for name, (micro_batch, every) in AUTO.items():
        config = recipe_config(CONFIGS / f"{name}.yaml")
        plans = [planned(config, free=free) for free in (SMALL_CARD_BYTES, H100, H200)]
        assert {plan.micro_batch for plan in plans} == {micro_batch}, name
        assert tuple(plan.checkpoint_every for plan in plans) == every, name


def with_auto(config: TrainConfig) -> TrainConfig:
    optim = replace(config.optim, micro_batch="auto")
    return replace(config, optim=optim, model=replace(config.model, checkpoint_every="auto"))


def test_an_open_micro_batch_is_the_share_of_a_rank_or_the_most_that_fits_without_recomputation() -> None:
    config = with_auto(recipe_config(CONFIGS / "pretrain_vitb16_ego4d.yaml"))
    small = planned(config, free=SMALL_CARD_BYTES)
    assert (small.micro_batch, small.checkpoint_every) == (256, 1)  # as published
    alone = planned(config, free=H100, ranks=1)
    assert (alone.micro_batch, alone.checkpoint_every) == (256, 0)  # 8 micro-batches
    assert planned(config, free=SMALL_CARD_BYTES, ranks=1).micro_batch == 64
    assert "64 clips a pass with no recomputed blocks need about" in (
        planned(config, free=SMALL_CARD_BYTES, ranks=1).line
    )
    fixed = replace(config, model=replace(config.model, checkpoint_every=1))
    assert planned(fixed, free=SMALL_CARD_BYTES, ranks=1).checkpoint_every == 1
    with pytest.raises(UserError, match="a step of one clip needs .* GiB, and 0.5 GiB are free"):
        planned(config, free=GIB // 2)


def test_a_resolved_run_has_numbers_and_says_them() -> None:
    config = with_auto(tiny_config("vit", "classification"))
    config = replace(config, decoder="cpu-fused", optim=replace(config.optim, global_batch=12))
    run = resolve(config, Distributed(world_size=2))
    model = run.task.build_model(run.config, 1)
    assert count_parameters(config, run.task) == sum(p.numel() for p in model.parameters())
    assert (run.micro_batch, run.accum_steps) == (6, 1)
    assert (run.config.optim.micro_batch, run.config.model.checkpoint_every) == (6, 0)
    batch, memory = run.batch_lines()
    assert batch == "batch: 12 clips = 2 ranks x 6 clips x 1 micro-batches"
    assert memory.startswith("memory: 6 clips a pass with no recomputed blocks need about 0.")
    assert resolve(replace(config, optim=OptimConfig(), model=ModelConfig()), Distributed()).memory is None
    assert resolve(run.config, Distributed(world_size=2)).config == run.config  # nothing is left to resolve
