"""Speed of a whole training step with its clips on the device already: how near to the hardware the model runs.

python -m benchmarks.train.step [--quick]

A step is: bytes to numbers, forward pass, loss, backward pass, AdamW. Contrastive for the dual encoders,
reconstruction for VideoMAE. Floating-point operations are counted by PyTorch (`torch.utils.flop_counter`) on
shapes alone: two for each multiplication and addition of a matrix product, forwards and backwards; attention
counts as its two products, also where a kernel computes one of them again. Two conventions:

* model: what the formula needs, without recomputed blocks (MFU, Chowdhery et al. 2022, arXiv 2204.02311,
  appendix B);
* hardware: recomputed blocks included (HFU).

`benchmarks.gpu` measures the models; here, on the CPU, ours is compared with the same tower made of open_clip's
modules, in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from avion_dali.config import AttentionBackend, CompileMode, ModelConfig, ModelSize
from avion_dali.contracts import UserError
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.models.attention import resolve_attention
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.masked_video import MaskedVideo, build_masked_video, tube_targets
from avion_dali.models.presets import PRESETS
from avion_dali.models.videomae import TUBE_FRAMES
from avion_dali.objectives.contrastive import info_nce
from benchmarks.report import Benchmark, Row, every_row, parser_of

# Dense bfloat16 peaks in TFLOP/s, from NVIDIA's data sheets; matched against the start of the device's name.
PEAK_TFLOPS = {
    "NVIDIA H200": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA A100": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA RTX A5000": 111.0,
    "NVIDIA GeForce RTX 4090": 165.0,
}
# TFLOP of a clip by encoder, size and frames, without and with recomputed blocks, as `count_flops` counts them:
# counting takes seconds, in which a GPU would idle.
COUNTED_TFLOP: dict[tuple[str, str, int], tuple[float, float]] = {
    ("vit", "vit_b16", 4): (0.4879, 0.6036),
    ("vit", "vit_b16", 16): (2.7122, 3.4343),
    ("vit", "vit_l14", 4): (2.2094, 2.7344),
    ("timesformer", "vit_b16", 4): (0.5708, 0.7141),
    ("videomae", "vit_b16", 16): (0.2023, 0.2513),
}
MASK_RATIO = 0.9
DECODER_DEPTH = 4
WARM_STEPS, STEPS = 4, 10


@dataclass(frozen=True)
class Case:
    """One step that is measured."""

    encoder: str = "vit"  # `videomae` is pre-trained, others are trained with texts
    size: ModelSize = "vit_b16"  # of the model
    frames: int = 4  # of a clip
    batch: int = 64  # clips of a step
    attention: AttentionBackend = "sdpa"  # its kernel
    checkpoint_every: int = 0  # recompute every n-th block
    compile: bool = False  # each block
    compile_mode: CompileMode = "default"  # of torch.compile
    frame_size: int = 0  # side of a frame in pixels; 0 takes that of the size

    @property
    def side(self) -> int:
        """Side of a frame in pixels."""
        return self.frame_size or PRESETS[self.size].image_size

    def build(self) -> nn.Module:
        """Create the model on the default device."""
        config = ModelConfig(
            encoder=self.encoder,
            size=self.size,
            attention=self.attention,
            checkpoint_every=self.checkpoint_every,
            compile=self.compile,
            compile_mode=self.compile_mode,
        )
        if self.encoder == "videomae":
            return build_masked_video(
                config, num_frames=self.frames, frame_size=self.side, decoder_depth=DECODER_DEPTH
            )
        return build_dual_encoder(config, num_frames=self.frames, frame_size=self.side)


class Step:
    """A model, its optimizer and a batch that stays on the device."""

    def __init__(self, case: Case, device: str, *, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.case, self.device, self.dtype = case, torch.device(device), dtype
        with self.device:
            self.model = case.build().train()
        fused = self.device.type == "cuda"
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=fused or None)
        shape = (case.batch, case.frames, case.side, case.side, 3)
        self.frames_BTHWC = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        self._tokens_BL, self._is_masked_BN = self._texts(), self._masks()

    def run(self) -> None:
        """Take one step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        """Run the model forwards and compare."""
        half = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()
        with half:
            outputs = self.outputs()
        if len(outputs) == 3:
            return info_nce(outputs[0], outputs[1], scale=outputs[2].mean())[0]
        targets_BMX = tube_targets(self.frames_BTHWC, self._is_masked_BN, normalize=True)
        return functional.mse_loss(outputs[0].float(), targets_BMX)

    def outputs(self) -> tuple[Tensor, ...]:
        """What the model makes of the batch: two vectors and a scale, or predictions."""
        frames_BCTHW = normalize_frames(self.frames_BTHWC, "openai", dtype=self.dtype)
        if isinstance(self.model, MaskedVideo):
            return (self.model(frames_BCTHW, self._is_masked_BN),)
        video_BD, text_BD, scale_B = self.model(frames_BCTHW, self._tokens_BL)
        return video_BD, text_BD, scale_B

    def _texts(self) -> Tensor:
        """A text for every clip, as long as texts can be."""
        return torch.randint(1, 49_408, (self.case.batch, 77), device=self.device)

    def _masks(self) -> Tensor:
        """Tube masks, on the CPU as in training."""
        places = (self.case.side // PRESETS[self.case.size].patch_size) ** 2
        hidden = round(MASK_RATIO * places)
        is_masked_BS = torch.rand(self.case.batch, places).argsort(dim=1) < hidden
        return is_masked_BS.repeat(1, self.case.frames // TUBE_FRAMES)


def count_flops(case: Case) -> tuple[float, float]:
    """Count the operations of a clip, on shapes alone.

    Returns:
        TFLOP per clip by the two conventions: of the model, and of the hardware.
    """
    # Matrix products as written, so that they are seen; two clips, since a contrastive loss compares.
    shapes = replace(case, batch=2, attention="math", compile=False, compile_mode="default")
    counts = []
    for every in (0, case.checkpoint_every):
        step = Step(replace(shapes, checkpoint_every=every), "meta", dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            torch.stack([output.sum() for output in step.outputs()]).sum().backward()
        counts.append(counter.get_total_flops() / shapes.batch / 1e12)
    return counts[0], counts[1]


def flops(case: Case) -> tuple[float, float]:
    """Return what `count_flops` does, at once for the usual cases."""
    known = COUNTED_TFLOP.get((case.encoder, case.size, case.frames))
    if known and not case.frame_size and case.checkpoint_every in (0, 1):
        return known[0], known[case.checkpoint_every]
    return count_flops(case)


def peak_tflops(device_name: str) -> float | None:
    """Return the peak rate of a device if it is known; longer names are more exact."""
    known = [name for name in PEAK_TFLOPS if device_name.startswith(name)]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True)
class Timing:
    """Seconds of each of several steps."""

    wall_s: list[float]  # passed
    cpu_s: list[float]  # spent by this process on all cores


def time_steps(run: Callable[[], None], device: torch.device, *, warm: int, steps: int) -> Timing:
    """Time steps, each to its end on the device; the first few are not counted."""
    timing = Timing([], [])
    for _ in range(warm + steps):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        timing.wall_s.append(time.perf_counter() - wall)
        timing.cpu_s.append(time.process_time() - cpu)
    return Timing(timing.wall_s[warm:], timing.cpu_s[warm:])


def measure_case(
    case: Case,
    device: str,
    *,
    warm: int = WARM_STEPS,
    steps: int = STEPS,
    inspect: Callable[[Step], Row] = lambda step: {},
) -> Row:
    """Time one kind of step and inspect it, or return why it does not fit or its kernel is missing."""
    what: Row = {name: value for name, value in vars(case).items() if name != "frame_size"}
    on_gpu = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    try:
        kernel = resolve_attention(case.attention, torch.device(device), dtype=dtype)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = Step(case, device, dtype=dtype)
        timing = time_steps(step.run, step.device, warm=warm, steps=steps)
        inspected = inspect(step)
    except UserError as error:
        return {**what, "not_run": str(error)}
    except torch.OutOfMemoryError:
        return {**what, "not_run": "out of memory"}
    row = {**what, "attention": kernel, **rates(case, timing, device), **inspected}
    if on_gpu:
        row["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return row


def rates(case: Case, timing: Timing, device: str) -> Row:
    """Put a step's time and its operations together."""
    step_s = statistics.median(timing.wall_s)
    model_tflop, hardware_tflop = flops(case)
    on_gpu = torch.device(device).type == "cuda"
    peak = peak_tflops(torch.cuda.get_device_name(device)) if on_gpu else None
    clips_per_s = case.batch / step_s
    return {
        "step_ms": round(1000 * step_s, 1),
        "spread_ms": round(1000 * (max(timing.wall_s) - min(timing.wall_s)), 1),
        "clips_per_s": round(clips_per_s, 2),
        "model_tflop_per_clip": round(model_tflop, 4),
        "hardware_tflop_per_clip": round(hardware_tflop, 4),
        "model_tflop_per_s": round(model_tflop * clips_per_s, 4),
        "mfu": round(model_tflop * clips_per_s / peak, 3) if peak else None,
        "hfu": round(hardware_tflop * clips_per_s / peak, 3) if peak else None,
        **({} if on_gpu else {"cpu_s": round(min(timing.cpu_s), 3)}),
    }


class OpenClipTower(nn.Module):
    """Our video tower out of open_clip's modules, with the same parameters under the same names."""

    def __init__(self, case: Case) -> None:
        from open_clip.transformer import LayerNorm, Transformer

        super().__init__()
        preset = PRESETS[case.size]
        width, patch = preset.video_width, preset.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + (case.side // patch) ** 2, width))
        if case.frames > 1:
            self.temporal_embedding = nn.Parameter(torch.zeros(case.frames, width))
        self.ln_pre = LayerNorm(width, eps=1e-6)
        norm = lambda width: LayerNorm(width, eps=1e-6)  # noqa: E731
        self.transformer = Transformer(
            width, preset.video_layers, preset.video_heads, act_layer=nn.GELU, norm_layer=norm
        )
        self.ln_post = LayerNorm(width, eps=1e-6)
        self.image_projection = nn.Parameter(torch.zeros(width, 256))

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Float (B, 3, T, H, W) -> (B, 256)."""
        clips, frames = frames_BCTHW.shape[0], frames_BCTHW.shape[2]
        x = self.conv1(frames_BCTHW.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        x = x.unflatten(0, (clips, frames)) + self.positional_embedding[1:]
        if frames > 1:
            x = x + self.temporal_embedding.unsqueeze(1)
        token = (self.class_embedding + self.positional_embedding[0]).expand(clips, 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([token, x.flatten(1, 2)], dim=1)))
        projected: Tensor = self.ln_post(x[:, 0]) @ self.image_projection
        return projected


def against_open_clip(case: Case, *, rounds: int = 4) -> Row:
    """Time forward and backward pass and AdamW of both towers in turns, on the CPU, in float32."""
    torch.manual_seed(0)
    config = ModelConfig(size=case.size, attention=case.attention)
    ours = build_dual_encoder(config, num_frames=case.frames, frame_size=case.side).visual
    theirs = OpenClipTower(case)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    frames_BTHWC = torch.randint(0, 256, (case.batch, case.frames, case.side, case.side, 3)).byte()
    with torch.no_grad():
        frames_BCTHW = normalize_frames(frames_BTHWC, "openai")
        difference = float((ours(frames_BCTHW) - theirs(frames_BCTHW)).abs().max())
    towers = {"ours": ours, "open_clip": theirs}
    optimizers = {name: torch.optim.AdamW(tower.parameters()) for name, tower in towers.items()}

    def step(name: str) -> None:
        towers[name](normalize_frames(frames_BTHWC, "openai")).square().mean().backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    cpu = torch.device("cpu")
    timings: dict[str, list[Timing]] = {name: [] for name in towers}
    for number in range(rounds + 1):
        for name in towers:
            timing = time_steps(partial(step, name), cpu, warm=0, steps=1)
            if number:  # the first of each is not counted
                timings[name].append(timing)
    wall = {name: min(timing.wall_s[0] for timing in own) for name, own in timings.items()}
    used = {name: min(timing.cpu_s[0] for timing in own) for name, own in timings.items()}
    return {
        "measured": "our tower against open_clip's modules",
        "size": case.size,
        "frames": case.frames,
        "batch": case.batch,
        "largest_difference_of_outputs": difference,
        "ours_s": round(wall["ours"], 3),
        "open_clip_s": round(wall["open_clip"], 3),
        "wall_ratio": round(wall["ours"] / wall["open_clip"], 3),
        "cpu_ratio": round(used["ours"] / used["open_clip"], 3),
    }


BENCHMARK = Benchmark("train_step", every_row)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="compare tiny towers")
    options = parser.parse_args()
    size: ModelSize = "tiny" if options.quick else "vit_b16"
    cases = [Case(size=size, frames=frames, batch=2) for frames in (1, 4)]
    BENCHMARK.run(options, lambda: [against_open_clip(case) for case in cases])


if __name__ == "__main__":
    main()
