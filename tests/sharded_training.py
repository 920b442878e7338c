"""What four gloo processes do for `test_sharding.py`: two of them train replicas, then all train shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from toy_training import ToyStats

from avion_dali.config import ModelConfig, OptimConfig, RunConfig
from avion_dali.contracts import ClipBatch
from avion_dali.engine.checkpoint import LATEST_NAME
from avion_dali.engine.distributed import Distributed, all_gather_rows, barrier, init_distributed, shutdown
from avion_dali.engine.loop import TrainLoop
from avion_dali.engine.loop_settings import LoopSettings
from avion_dali.engine.optimizers import build_optimizer, parameter_groups
from avion_dali.engine.sharding import gathered, shard_model, weight_sum
from avion_dali.models.dual_encoder import DualEncoder, build_dual_encoder
from avion_dali.models.presets import PRESETS
from avion_dali.objectives.contrastive import Contrastive

GLOBAL_BATCH, FRAMES, SIDE, TEXT = 8, 2, 32, 8
STEPS_PER_EPOCH = 3
WORDS = 100


def global_clips(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(step)
    frames = rng.integers(0, 255, (GLOBAL_BATCH, FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    tokens = rng.integers(1, WORDS - 1, (GLOBAL_BATCH, TEXT))
    tokens[:, -1] = WORDS - 1  # the largest id ends a text
    return torch.from_numpy(frames), torch.from_numpy(tokens)


class SplitLoader:
    """The same global batches for any number of ranks and micro-batches."""

    def __init__(self, distributed: Distributed, *, accum_steps: int) -> None:
        self.steps_per_epoch, self.accum_steps, self.stats = STEPS_PER_EPOCH, accum_steps, ToyStats()
        self.distributed = distributed
        self.rows = GLOBAL_BATCH // (accum_steps * distributed.world_size)

    def batches(self, first_step: int, last_step: int):
        for step in range(first_step, last_step):
            frames, tokens = global_clips(step)
            for micro in range(self.accum_steps):
                first = (micro * self.distributed.world_size + self.distributed.rank) * self.rows
                part = slice(first, first + self.rows)
                yield ClipBatch(
                    frames_BTHWC=frames[part],
                    tokens_BL=tokens[part],
                    labels_B=None,
                    sample_ids=np.arange(part.start, part.stop) + step * GLOBAL_BATCH,
                    view_ids=np.zeros(self.rows, dtype=np.int64),
                    valid=np.ones(self.rows, dtype=bool),
                )

    def close(self) -> None:
        pass


def fresh_model() -> DualEncoder:
    torch.manual_seed(5)
    config = ModelConfig(size="tiny", embed_dim=32, context_length=TEXT, train_logit_scale=True)
    smaller = replace(PRESETS["tiny"], vocab_size=WORDS, video_layers=2, text_layers=2)
    with patch.dict(PRESETS, tiny=smaller):
        return build_dual_encoder(config, num_frames=FRAMES, frame_size=SIDE)


def make_training(
    folder: Path,
    distributed: Distributed,
    *,
    accum_steps: int = 1,
    sharding: str = "replicate",
    precision: str = "fp32",
    sharding_dtype: str = "fp32",
    max_steps: int = 5,
    **optim: object,
) -> TrainLoop:
    # A large epsilon: Adam's first steps otherwise turn the last bit of a tiny gradient into a full step.
    optim_config = OptimConfig(
        global_batch=GLOBAL_BATCH,
        micro_batch=GLOBAL_BATCH // (accum_steps * distributed.world_size),
        epochs=4,
        learning_rate=3e-3,
        **{"eps": 1e-2, "clip_grad_norm": 1.0, "ema_decay": 0.5, **optim},
    )
    run = RunConfig(
        seed=1,
        log_every=1,
        sharding=sharding,
        sharding_dtype=sharding_dtype,
        precision=precision,
        max_steps=max_steps,
    )
    model = fresh_model()
    shard_model(model, run, distributed=distributed)
    return TrainLoop(
        model,
        build_optimizer(parameter_groups(model, optim_config.weight_decay), optim_config),
        objective=Contrastive("openai"),
        loader=SplitLoader(distributed, accum_steps=accum_steps),
        settings=LoopSettings(
            output_dir=folder, optim=optim_config, run=run, config={}, best_metric="score", tensorboard=False
        ),
        distributed=distributed,
        evaluate=score_of(model, distributed),
        after_step=model.clamp_logit_scale,
    )


def score_of(model: DualEncoder, distributed: Distributed) -> Callable[[], dict[str, float]]:
    """An evaluation whose ranks call the model unequally often."""

    def evaluate() -> dict[str, float]:
        total = torch.zeros(1)
        with torch.inference_mode():
            for _ in range(distributed.rank + 1):
                _, tokens = global_clips(0)
                total = model.encode_text(tokens)[:, 0].sum()[None]
                total += model.encode_video(torch.ones(1, 3, FRAMES, SIDE, SIDE))[:, 0]
        return {"score": float(all_gather_rows(total)[0])}

    return evaluate


def gradients(loop: TrainLoop) -> dict[str, torch.Tensor]:
    """Whole gradients of the first step, before clipping."""
    (_,) = loop.steps(0, 1)
    return {n: gathered(p.grad.clone(), keep=True) for n, p in loop.model.named_parameters()}


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gathered(model.state_dict(), keep=True).items()}


def join(rank: int, world_size: int, port: int) -> Distributed:
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
    return init_distributed(use_cuda=False, timeout_s=60)


def two_replicas(rank: int, folder: Path, port: int) -> None:
    """Goes on from one process's third step to the sixth."""
    here = join(rank, 2, port)
    make_training(folder / "two", here).run()
    loop = make_training(folder / "chain", here, max_steps=6)
    loop.restore(folder / "chain" / LATEST_NAME)
    loop.run()
    barrier()
    shutdown()


def four_shards(rank: int, folder: Path, port: int) -> None:
    """The same run sharded; then from the sixth step of the chain to the ninth; then single steps."""
    here = join(rank, 4, port)
    loop = make_training(folder / "four", here, sharding="shard")
    results: dict[str, object] = {"weight_sum": weight_sum(loop.model)}
    parts = [p for p in loop.model.parameters() if isinstance(p, DTensor)]
    results["own_share"] = sum(p.to_local().numel() for p in parts) / sum(p.numel() for p in parts)
    loop.run()
    loop.export(folder / "four.safetensors")
    chain = make_training(folder / "chain", here, sharding="shard", max_steps=9)
    chain.restore(folder / "chain" / LATEST_NAME)
    results["restored"] = whole_weights(chain.model)
    chain.run()
    for accum_steps in (1, 2):
        one = make_training(
            folder / "none", here, sharding="shard", accum_steps=accum_steps, clip_grad_norm=0.0
        )
        results[f"gradients{accum_steps}"] = gradients(one)
    lion = make_training(folder / "lion", here, sharding="shard", max_steps=2, optimizer="lion")
    lion.run()
    results["lion"] = whole_weights(lion.model)
    half = make_training(folder / "none", here, sharding="shard", precision="bf16")
    (numbers,) = half.steps(0, 1)
    results["half"] = float(numbers["loss"])
    sent = make_training(folder / "none", here, sharding="shard", precision="bf16", sharding_dtype="bf16")
    used: list[torch.dtype] = []
    for block in [*sent.model.visual.transformer.resblocks, *sent.model.textual.transformer.resblocks]:
        norm = block.ln_1
        norm.register_forward_pre_hook(lambda norm, given: used.extend((given[0].dtype, norm.weight.dtype)))
    results["sent_half"] = [float(numbers["loss"]) for numbers in sent.steps(0, 3)]
    results["used_dtypes"] = set(used)
    results["sent_dtypes"] = {p.dtype for p in whole_weights(sent.model).values()}
    torch.save(results, folder / f"rank{rank}.pt")
    barrier()
    shutdown()


def rank_main(rank: int, folder: Path, ports: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    if rank < 2:
        two_replicas(rank, folder, ports[0])
    four_shards(rank, folder, ports[1])
