"""Seeded training steps give, bit for bit, what they gave when `seeded_steps.json` was recorded.

Every objective with every encoder it goes with is trained for 20 steps on the CPU, through the real assembly
and the real loaders with a decode process of their own, with and without gradient accumulation and with both
decoders. Of every step the file holds the loss and two digests for each micro-batch: what the clips are
(sample ids, tokens, labels) and what they show (frames).

Bits depend on the machine. Where the facts in `_environment` are those of the record, losses and digests must
equal it; elsewhere losses may differ by a thousandth and frames are not compared. One test is skipped there,
and says which facts differ.

After a change that is meant to change the numbers, record all of them anew and say so in the commit:

    AVION_RECORD_STEPS=1 python -m pytest tests/test_seeded_steps.py
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import make_videos
import numpy as np
import pytest
import torch
from annotation_files import write_lines
from dali_clips import VP9
from launch_data import manifest as make_manifest

from avion_dali.config import (
    AugmentConfig,
    ClassificationConfig,
    DataConfig,
    MaskedVideoConfig,
    MaxMarginConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

RECORD = Path(__file__).with_name("seeded_steps.json")
RECORDING = os.environ.get("AVION_RECORD_STEPS") == "1"
STEPS, CLIPS, THREADS = 20, 4, 1
PAIRS = [
    *itertools.product(("contrastive", "max-margin"), ("vit", "timesformer")),
    *itertools.product(("classification",), ("vit", "timesformer", "videomae")),
    ("masked-video", "videomae"),
]
# Every source of randomness is on somewhere: windows, mirroring, texts, colours, boxes, mixing, dropped blocks,
# dropped patches, masks.
DATA: dict[str, dict[str, Any]] = {
    "contrastive": {"flip_probability": 0.5},
    "max-margin": {"crop": "simple-random"},
    "classification": {"sampling": "dense", "flip_probability": 0.5, "repeats": 2, "normalization": "imagenet"},
    "masked-video": {"sampling": "strided", "crop": "multi-scale", "normalization": "imagenet"},
}
AUGMENT = {
    "contrastive": AugmentConfig(color_jitter=0.4),
    "classification": AugmentConfig(rand_augment_ops=2, erasing_probability=0.5),
}
CLASSIFICATION = ClassificationConfig(dropout=0.1, label_smoothing=0.1, mixup=0.8, cutmix=1.0)
GRADED = MaxMarginConfig(loss="symmetric-multi-similarity", margin=0.6)

Digests = tuple[str, str]
Step = tuple[str, list[Digests]]


def _record(config: TrainConfig) -> list[Step]:
    """Train from the start: the loss (`float.hex`) of every step and the digests of its micro-batches.

    The one place that knows how the library puts a training together and takes a step.
    """
    from avion_dali.assembly.training import training
    from avion_dali.engine.distributed import Distributed
    from avion_dali.models.presets import PRESETS

    # Narrow texts, whose table of 49408 words is most of the model: that halves the time.
    smaller = replace(PRESETS["tiny"], video_layers=2, text_width=32, text_heads=2)
    steps: list[Step] = []
    seen: list[Digests] = []
    with patch.dict(PRESETS, tiny=smaller), training(config, Distributed()) as loop:
        deliver = loop.next_batch

        def next_batch() -> Any:
            batch = deliver()
            seen.append(_digests(batch))
            return batch

        loop.next_batch = next_batch
        for numbers in loop.steps(0, STEPS):
            steps.append((float(numbers["loss"]).hex(), seen.copy()))
            seen.clear()
    return steps


def _digests(batch: Any) -> Digests:
    """What the clips of a micro-batch are, and what they show."""
    facts, frames = hashlib.sha256(batch.sample_ids.astype("<i8").tobytes()), batch.frames_BTHWC
    for values in (batch.tokens_BL, batch.labels_B):
        facts.update(
            b"none" if values is None else f"{tuple(values.shape)}".encode() + values.numpy().tobytes()
        )
    shown = hashlib.sha256(f"{tuple(frames.shape)}".encode() + frames.contiguous().numpy().tobytes())
    return facts.hexdigest()[:16], shown.hexdigest()[:16]


def _config(
    objective: str, encoder: str, *, accum: int, decoder: str, manifest: Path, output: Path
) -> TrainConfig:
    is_graded = (objective, encoder) == ("max-margin", "timesformer")
    text = {"text": "relevant"} if is_graded else {}
    return TrainConfig(
        output_dir=str(output),
        decoder=decoder,
        data=DataConfig(
            train_manifest=str(manifest),
            num_frames=4,
            frame_size=32,
            workers=1,
            prefetch_batches=2,
            **DATA[objective],
            **text,
        ),
        augment=AUGMENT.get(objective, AugmentConfig()),
        model=ModelConfig(
            encoder=encoder,
            size="tiny",
            embed_dim=32,
            context_length=8,
            drop_path=0.1,
            patch_dropout=0.25 if encoder == "vit" else 0.0,
            attention="sdpa",
        ),
        objective=ObjectiveConfig(
            name=objective,
            max_margin=GRADED if is_graded else MaxMarginConfig(),
            classification=CLASSIFICATION,
            masked_video=MaskedVideoConfig(mask_ratio=0.5, decoder_depth=1),
        ),
        # One step more than is taken, so that no weights are exported.
        optim=OptimConfig(
            global_batch=CLIPS,
            micro_batch=CLIPS // accum,
            epochs=7,
            learning_rate=2e-4,
            warmup_epochs=1.0,
            layer_decay=0.9,
            weight_decay=0.05,
            clip_grad_norm=1.0,
        ),
        run=RunConfig(seed=7, precision="fp32"),
    )


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of three seconds, the first in two chunks, as VP9, which both decoders read."""
    folder = tmp_path_factory.mktemp("seeded") / "chunks"
    for name, frames, first in (("a.MP4/0", 60, 0), ("a.MP4/2", 30, 60), ("b.MP4/0", 90, 200)):
        path = folder / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_videos.write_video(path, frames=frames, size=(64, 48), first_number=first, **VP9)
    return folder


@pytest.fixture(scope="module")
def manifest(chunks: Path) -> Path:
    """14 rows, three steps an epoch and two rows left over, with texts, classes and grades."""
    lines = ["video,start,end,text,verb,noun,label"]
    kinds = list(itertools.product(("cut", "wash", "open"), ("carrot", "knife")))
    for i in range(14):
        (verb, noun), start = kinds[i % 6], round(0.28 * (i // 2), 2)
        lines.append(f"{'ab'[i % 2]},{start},{start + 1:.2f},{verb} the {noun} {i},{verb},{noun},{verb}")
    csv, output = write_lines(chunks.parent / "rows.csv", *lines), chunks.parent / "manifest"
    make_manifest("captions", "--chunks", chunks, "--annotations", csv, "--output", output)
    return output


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Sums are split among threads, so their number is fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def environment(chunks: Path) -> dict[str, str]:
    return _environment(chunks)


def _environment(chunks: Path) -> dict[str, str]:
    """What bits depend on, as far as can be told."""
    media = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(chunks.rglob("*.mp4"))))
    packages = {name: _version(name) for name in ("torch", "av", "numpy", "nvidia-dali")}
    return {
        **packages,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "chunks": media.hexdigest()[:16],
        "arithmetic": _arithmetic(),
    }


def _version(package: str) -> str:
    """The version of a package, whose name may end in that of a CUDA version."""
    found = (d for d in importlib.metadata.distributions() if (d.name or "").startswith(package))
    return next((d.version for d in sorted(found, key=lambda d: d.name) if _is(package, d.name)), "none")


def _is(package: str, name: str) -> bool:
    return name == package or name.startswith(f"{package}-cuda")


def _arithmetic() -> str:
    """Digest of a layer's outputs and gradients: processors with one instruction set may still round apart."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    wave = torch.sin(torch.arange(64 * 192, dtype=torch.float64)).float().reshape(64, 192)
    weights = torch.cos(torch.arange(192 * 192, dtype=torch.float64)).float().reshape(192, 192)
    weights = (weights / 192**0.5).requires_grad_()
    inner = torch.nn.functional.gelu(torch.nn.functional.layer_norm(wave, (192,)) @ weights)
    output = torch.log_softmax(inner @ weights.T, dim=-1).square().mean()
    output.backward()
    torch.set_num_threads(before)
    numbers = torch.cat([output.detach().reshape(1), weights.grad.flatten()])
    assert numbers.isfinite().all()
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]


def _load() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {"environment": {}, "runs": {}}


@pytest.fixture(scope="module")
def recorder(environment: dict[str, str]) -> Iterator[dict[str, list[str]]]:
    """Takes runs to record; at the end they join those of the same environment in the file."""
    runs: dict[str, list[str]] = {}
    yield runs
    if runs:
        old = _load()
        kept = old["runs"] if old["environment"] == environment else {}
        record = {"environment": environment, "runs": dict(sorted({**kept, **runs}.items()))}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


def _line(step: Step) -> str:
    """A step as it is stored: the loss, then `facts:frames` for each micro-batch."""
    loss, digests = step
    return " ".join([loss, *map(":".join, digests)])


def _differences(found: list[str], recorded: list[str], *, exact: bool) -> list[str]:
    """The steps that are not as recorded; without `exact`, as far as another machine can tell."""
    assert len(found) == len(recorded) == STEPS
    pairs = enumerate(zip(found, recorded, strict=True))
    same = str.__eq__ if exact else _alike
    return [f"step {i}: {new}, recorded {old}" for i, (new, old) in pairs if not same(new, old)]


def _alike(line: str, recorded: str) -> bool:
    (loss, *batches), (old_loss, *old_batches) = line.split(), recorded.split()
    facts, old_facts = ([pair.partition(":")[0] for pair in pairs] for pairs in (batches, old_batches))
    return facts == old_facts and float.fromhex(loss) == pytest.approx(float.fromhex(old_loss), rel=1e-3)


@pytest.mark.parametrize("decoder", ["cpu-fused", "dali"])
@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize(("objective", "encoder"), PAIRS)
def test_steps_are_those_recorded(
    objective: str,
    encoder: str,
    accum: int,
    decoder: str,
    manifest: Path,
    environment: dict[str, str],
    recorder: dict[str, list[str]],
    tmp_path: Path,
) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    config = _config(objective, encoder, accum=accum, decoder=decoder, manifest=manifest, output=tmp_path)
    steps = _record(config)
    assert [len(digests) for _, digests in steps] == [accum] * STEPS
    name, lines = f"{objective} {encoder} accum{accum} {decoder}", list(map(_line, steps))
    if RECORDING:
        recorder[name] = lines
        return
    record = _load()
    wrong = _differences(lines, record["runs"][name], exact=environment == record["environment"])
    assert not wrong, f"{len(wrong)} of {STEPS} steps differ:\n" + "\n".join(wrong)


@pytest.mark.skipif(RECORDING, reason="the record is being made")
def test_bits_can_be_compared_here(environment: dict[str, str]) -> None:
    recorded = _load()["environment"]
    differing = {k: (environment.get(k), v) for k, v in recorded.items() if environment.get(k) != v}
    if differing:
        pytest.skip(
            f"losses are compared to a thousandth, frames not at all; here and in the record: {differing}"
        )
    assert environment == recorded


@pytest.mark.skipif(RECORDING, reason="the record is being made")
def test_the_last_bit_counts() -> None:
    """Of a loss, and of a digest; on other machines, a thousandth of the loss and what the clips are."""
    runs = _load()["runs"]
    lines = runs["contrastive vit accum2 dali"]
    loss, *digests = lines[7].split()
    value = np.float32(float.fromhex(loss))
    flipped = digests[1][:-1] + "0123456789abcdef"[int(digests[1][-1], 16) ^ 1]
    last_bit = [float(np.nextafter(value, np.float32(np.inf))).hex(), *digests]
    for step, elsewhere in (
        (last_bit, False),
        ([loss, digests[0], flipped], False),
        ([(float(value) * 1.002).hex(), *digests], True),
        ([loss, digests[0], "0" + digests[1][1:] if digests[1][0] != "0" else "1" + digests[1][1:]], True),
        ([loss, digests[0]], True),
    ):
        changed = [*lines[:7], " ".join(step), *lines[8:]]
        assert len(_differences(changed, lines, exact=True)) == 1
        assert len(_differences(changed, lines, exact=False)) == elsewhere
    assert not _differences(lines, lines, exact=True)
    assert len(runs) == 4 * len(PAIRS)
