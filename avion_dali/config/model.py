"""Settings of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from avion_dali.config.checks import require
from avion_dali.contracts import UserError

ModelSize = Literal["tiny", "vit_b16", "vit_l16", "vit_l14", "vit_l14_336"]
Activation = Literal["gelu", "quick_gelu"]
AttentionBackend = Literal["auto", "sdpa", "cudnn", "flash", "efficient", "flash-attn", "xformers", "math"]
ResidualDtype = Literal["fp32", "bf16"]
CompileMode = Literal["default", "max-autotune-no-cudagraphs"]
TemporalResize = Literal["interpolate", "truncate"]
DEFAULT_NORM_EPS: Final = 1e-6
"""LayerNorm epsilon of a video tower if neither its configuration nor its weights specify one."""


@dataclass(frozen=True)
class ModelConfig:
    """The video encoder and, for retrieval, its text tower.

    Args:
        encoder: name of a video tower in `avion_dali/models/towers.py`: `vit` (AVION), `timesformer` (LaViLa)
            or `videomae` (tubelets, mean of tokens).
        size: a key of `avion_dali/models/presets.py`.
        weights: initial weights: empty for random weights; a file (a checkpoint or safetensors file of this
            project, AVION, LaViLa, EgoVLP, VideoMAE or open_clip); or `open_clip:NAME/PRETRAINED`, such as
            `open_clip:ViT-B-16/openai`.
        temporal_resize: how the frame positions of the initial weights are adapted to fewer frames:
            `interpolate`, or `truncate` as in AVION.
        embed_dim: width of the shared video-text space.
        activation: `gelu` (exact) or `quick_gelu`; `auto` uses the activation that the initial weights were
            trained with, or without such weights the default of the encoder. AVION's released models ran
            OpenAI's weights with `gelu`; set it to reproduce them.
        norm_eps: LayerNorm epsilon of the video tower, 1e-6 in AVION's models and 1e-5 in OpenAI's; 0 uses that
            of the initial weights, or 1e-6 without such weights.
        pre_norm: LayerNorm in front of the first block. Only a `timesformer` can be built without it. EgoVLP's
            weights have none, so a run that starts from them has none either.
        context_length: number of tokens that the text tower takes per text.
        drop_path: stochastic depth rate.
        drop_path_schedule: `constant` over the blocks, as in AVION's recipes, or `linear` from 0 in the first
            block to `drop_path` in the last (Huang et al. 2016, arXiv 1603.09382).
        patch_dropout: fraction of patch tokens dropped in training (`vit` only).
        attention: attention kernel of the video encoder; `auto` selects the best one that works on the device.
            `sdpa` is PyTorch's, which chooses among `cudnn`, `flash` and `efficient`; these names force one.
        residual_dtype: dtype of the tokens between the blocks of the video encoder. `bf16` saves memory
            traffic, changes numbers within its rounding, and needs `run.precision` bf16; an evaluation in fp32
            keeps the tokens in fp32.
        mlp_dtype: dtype of the matrix products in the MLPs of blocks that are at least 1024 wide, in training:
            `default` is that of `run.precision`. `fp8` changes numbers within its rounding and is faster only
            with `compile`; it needs `run.precision` bf16, the extra `fp8` (torchao) and an Ada or Hopper GPU or
            a later one. Weights stay as they are, and other commands than `train` compute in `run.precision`.
        checkpoint_every: recompute the activations of every n-th block in the backward pass (activation
            checkpointing); 0 for no block, 1 for all blocks. `auto` is 0 if the micro-batch then fits into the
            GPU's memory and 1 if not; the CPU counts as a GPU of 24 GB.
        compile: run torch.compile on each block.
        compile_mode: torch.compile's mode; needs `compile`. `max-autotune-no-cudagraphs` tries several kernels
            for each matrix product, also ones that add the bias, the activation or the residual branch, and
            takes the fastest; the first steps take minutes longer.
        train_logit_scale: learn the temperature; the published recipe keeps it at 0.07.
    """

    encoder: str = "vit"
    size: ModelSize = "vit_b16"
    weights: str = ""
    temporal_resize: TemporalResize = "interpolate"
    embed_dim: int = 256
    activation: Literal["auto", "gelu", "quick_gelu"] = "auto"
    norm_eps: float = 0.0
    pre_norm: bool = True
    context_length: int = 77
    drop_path: float = 0.0
    drop_path_schedule: Literal["constant", "linear"] = "constant"
    patch_dropout: float = 0.0
    attention: AttentionBackend = "auto"
    residual_dtype: ResidualDtype = "fp32"
    mlp_dtype: Literal["default", "fp8"] = "default"
    checkpoint_every: int | Literal["auto"] = 0
    compile: bool = False
    compile_mode: CompileMode = "default"
    train_logit_scale: bool = False

    def __post_init__(self) -> None:
        require(self.embed_dim >= 1, "model.embed_dim", value=self.embed_dim, allowed=">= 1")
        require(
            self.norm_eps >= 0,
            "model.norm_eps",
            value=self.norm_eps,
            allowed=">= 0 (0: that of the weights, else 1e-6)",
        )
        require(
            2 <= self.context_length <= 77,
            "model.context_length",
            value=self.context_length,
            allowed="in [2, 77]",
        )
        require(0 <= self.drop_path < 1, "model.drop_path", value=self.drop_path, allowed="in [0, 1)")
        require(
            0 <= self.patch_dropout < 1, "model.patch_dropout", value=self.patch_dropout, allowed="in [0, 1)"
        )
        every = self.checkpoint_every
        allowed = ">= 0 (0: none, 1: all blocks), or auto"
        require(every == "auto" or every >= 0, "model.checkpoint_every", value=every, allowed=allowed)
        if self.compile_mode != "default" and not self.compile:
            raise UserError(
                f"model.compile_mode = {self.compile_mode} needs model.compile = true; set it, or set "
                "model.compile_mode = default"
            )
