"""Chooses micro-batch and recomputation by the memory of the GPU, where a configuration leaves them open.

The memory of a step is counted as what autograd keeps for the backward pass, block by block, plus the gradients
on their way, the weights and the state of the optimizer. `tests/test_memory.py` compares the count with what
autograd keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch

from avion_dali.config import TrainConfig
from avion_dali.contracts import UserError
from avion_dali.engine.distributed import Distributed, all_gather_rows
from avion_dali.engine.precision import Precision
from avion_dali.models.presets import PRESETS
from avion_dali.models.towers import encoder_class
from avion_dali.tasks.table import find_task
from avion_dali.tasks.task import Task

GIB: Final = 2**30
SMALL_CARD_BYTES: Final = 23 * GIB
"""What is free on a GPU of 24 GB, with which the paper's settings were published; the CPU counts as one."""
RESERVE: Final = 0.05
"""Part of a GPU's memory that is left to the workspaces of kernels, to decode sessions and to fragmentation."""
OPTIMIZER_VALUES: Final = {"adamw": 2, "lion": 1, "sgd": 1}


class BlockValues(NamedTuple):
    """How many values of each token a tower keeps for the backward pass, in units of its width.

    Args:
        exact: values in float32: the inputs of norms, which are the residual stream.
        computed: values in the precision of matrix products: the inputs of linear maps, of the activation and
            of attention, and its output.
        ends: values in float32 before and after all blocks.
    """

    exact: int
    computed: int
    ends: int


PLAIN_BLOCK: Final = BlockValues(exact=2, computed=14, ends=2)
TEXT_BLOCK: Final = BlockValues(exact=2, computed=14, ends=1)
MASKED_BLOCK: Final = BlockValues(exact=2, computed=14, ends=1)
ENCODER_BLOCKS: Final = {
    "vit": PLAIN_BLOCK,
    "timesformer": BlockValues(exact=3, computed=31, ends=2),
    "videomae": BlockValues(exact=2, computed=14, ends=0),
}
GRADIENTS: Final = BlockValues(exact=2, computed=8, ends=0)
"""Gradients that exist at the same time in the backward pass of a block."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a tower, for one clip.

    Args:
        values: what a block keeps.
        tokens: tokens of a clip, or of its text.
        width: width of a token.
        layers: number of blocks.
        recomputed: blocks whose activations are recomputed; they keep only their input.
    """

    values: BlockValues
    tokens: int
    width: int
    layers: int
    recomputed: int

    def kept_bytes(self, value_bytes: int) -> int:
        """Return the bytes that are kept between the forward and the backward pass."""
        each = 4 * self.values.exact + value_bytes * self.values.computed
        values = (self.layers - self.recomputed) * each + 4 * (self.recomputed + self.values.ends)
        return self.tokens * self.width * values

    def passing_bytes(self, value_bytes: int) -> int:
        """Return the bytes that the backward pass of one block needs in addition."""
        each = 4 * GRADIENTS.exact + value_bytes * GRADIENTS.computed
        if self.recomputed:
            each += 4 * self.values.exact + value_bytes * self.values.computed
        return self.tokens * self.width * each


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is divided so that it fits.

    Args:
        micro_batch: clips per forward pass on one rank.
        checkpoint_every: as in `ModelConfig`.
        line: what was chosen and why, for the console.
    """

    micro_batch: int
    checkpoint_every: int
    line: str


def clip_blocks(config: TrainConfig, checkpoint_every: int) -> list[Blocks]:
    """Return the blocks that one clip passes.

    Args:
        config: the training's configuration.
        checkpoint_every: as in `ModelConfig`.
    """
    model, data, preset = config.model, config.data, PRESETS[config.model.size]
    encoder = encoder_class(model.encoder)
    patches = data.num_frames // encoder.tube_frames * (data.frame_size // preset.patch_size) ** 2

    def blocks(values: BlockValues, tokens: int, width: int, layers: int) -> Blocks:
        recomputed = -(-layers // checkpoint_every) if checkpoint_every else 0
        return Blocks(values, tokens, width, layers, recomputed)

    width, layers = preset.video_width, preset.video_layers
    task = find_task(config.objective.name)
    if task.hides_tubes:
        masked = config.objective.masked_video
        seen = patches - int(masked.mask_ratio * patches)
        decoder = blocks(MASKED_BLOCK, patches, width // 2, masked.decoder_depth)
        return [blocks(MASKED_BLOCK, seen, width, layers), decoder]
    tokens = encoder.layout.class_token + int(patches * (1 - model.patch_dropout))
    video = blocks(ENCODER_BLOCKS.get(model.encoder, PLAIN_BLOCK), tokens, width, layers)
    if not task.reads_texts:
        return [video]
    return [video, blocks(TEXT_BLOCK, model.context_length, preset.text_width, preset.text_layers)]


def kept_bytes(config: TrainConfig, *, checkpoint_every: int, precision: Precision) -> int:
    """Return the bytes that one clip leaves for the backward pass.

    Args:
        config: the training's configuration.
        checkpoint_every: as in `ModelConfig`.
        precision: precision of the forward pass.
    """
    value_bytes = 4 if precision == "fp32" else 2
    pixels = 3 * config.data.num_frames * config.data.frame_size**2
    # What the patch embedding multiplies; of a masked clip the visible part, and the errors of the hidden part.
    ends = value_bytes * pixels
    if find_task(config.objective.name).hides_tubes:
        hidden = config.objective.masked_video.mask_ratio
        ends = int(pixels * (value_bytes * (1 - hidden) + 4 * hidden))
    return ends + sum(blocks.kept_bytes(value_bytes) for blocks in clip_blocks(config, checkpoint_every))


def step_bytes(
    config: TrainConfig, clips: int, *, checkpoint_every: int, precision: Precision, parameters: int
) -> int:
    """Return the largest number of bytes that a step holds at the same time.

    Args:
        config: the training's configuration.
        clips: clips per forward pass.
        checkpoint_every: as in `ModelConfig`.
        precision: precision of the forward pass.
        parameters: number of parameters of the model.
    """
    value_bytes = 4 if precision == "fp32" else 2
    passing = max(blocks.passing_bytes(value_bytes) for blocks in clip_blocks(config, checkpoint_every))
    frames = 3 * config.data.num_frames * config.data.frame_size**2 * (1 + 4)  # as bytes, and normalized
    kept = kept_bytes(config, checkpoint_every=checkpoint_every, precision=precision)
    # Weights, gradients, state of the optimizer, running average, and copies of the weights for the products.
    values = 2 + OPTIMIZER_VALUES[config.optim.optimizer] + (config.optim.ema_decay > 0)
    copies = 0 if precision == "fp32" else value_bytes
    return parameters * (4 * values + copies) + clips * config.data.repeats * (kept + passing + frames)


def free_bytes(distributed: Distributed) -> int:
    """Return the bytes that the ranks' GPUs can hold, the smallest of all ranks; every rank must call it.

    Args:
        distributed: this process among all processes of the run.
    """
    if distributed.device.type != "cuda":
        return SMALL_CARD_BYTES
    free, total = torch.cuda.mem_get_info(distributed.device)
    own = torch.tensor([free - int(RESERVE * total)], device=distributed.device)
    return int(all_gather_rows(own).min())


def count_parameters(config: TrainConfig, task: Task) -> int:
    """Return the number of parameters of a training's model; it is built without memory for them."""
    as_built = replace(config.model, checkpoint_every=0, compile=False, compile_mode="default")
    plain = replace(config, model=as_built)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in task.build_model(plain, 1).parameters())


def plan_memory(
    config: TrainConfig,
    *,
    precision: Precision,
    ranks: int,
    free: int,
    parameters: int,
    decoding: int = 0,
) -> MemoryPlan:
    """Choose what `optim.micro_batch` and `model.checkpoint_every` leave open.

    A rank's share of the global batch is one micro-batch if it fits, with recomputed blocks if it does not fit
    without. A larger share is divided into the largest micro-batches that fit without recomputation, because
    losses that compare clips repeat the forward pass for several micro-batches anyway.

    Args:
        config: the training's configuration.
        precision: precision of the forward pass.
        ranks: number of processes.
        free: bytes that a step may hold.
        parameters: number of parameters of the model.
        decoding: bytes per clip that decoding takes beside the step.

    Raises:
        UserError: not even one clip fits.
    """
    micro, every = config.optim.micro_batch, config.model.checkpoint_every
    share = max(1, config.optim.global_batch // ranks)
    ways = (0, 1) if every == "auto" else (every,)

    def needed(clips: int, way: int) -> int:
        step = step_bytes(config, clips, checkpoint_every=way, precision=precision, parameters=parameters)
        return step + clips * decoding

    sizes = [share] if micro == "auto" else [micro]
    tried = [(clips, way) for clips in sizes for way in ways]
    if micro == "auto":
        tried += [(clips, way) for way in ways for clips in range(share - 1, 0, -1) if not share % clips]
    fitting = (choice for choice in tried if needed(*choice) <= free)
    # A given micro-batch is kept: the count is an estimate, and the user may know better.
    chosen = next(fitting, None if micro == "auto" else tried[-1])
    if chosen is None:
        raise UserError(
            f"a step of one clip needs {needed(1, ways[-1]) / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free; "
            "choose a smaller model.size, fewer data.num_frames, or set optim.micro_batch to try it anyway"
        )
    return MemoryPlan(*chosen, line=_line(chosen, needed, free=free))


def _line(chosen: tuple[int, int], needed: Callable[[int, int], int], *, free: int) -> str:
    clips, way = chosen
    blocks = {0: "no recomputed blocks", 1: "recomputed blocks"}.get(way, f"every {way}th block recomputed")
    return (
        f"memory: {clips} clips a pass with {blocks} need about {needed(clips, way) / GIB:.1f} of "
        f"{free / GIB:.1f} GiB"
    )
