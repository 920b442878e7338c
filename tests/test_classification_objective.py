"""Classification: targets, views, mixing, and what is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from avion_dali.config import AugmentConfig, ClassificationConfig
from avion_dali.contracts import ClipBatch, UserError
from avion_dali.device_ops.normalize import normalize_frames
from avion_dali.device_ops.step_key import StepKey
from avion_dali.objectives.classification import Classification

KEY = StepKey(seed=1, step=3)
CLASSES = 4


def make_batch(clips: int = 3, views: int = 1, labels: bool = True) -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    return ClipBatch(
        frames_BTHWC=torch.randint(
            0, 256, (clips * views, 2, 16, 16, 3), dtype=torch.uint8, generator=generator
        ),
        tokens_BL=None,
        labels_B=torch.arange(clips) % CLASSES if labels else None,
        sample_ids=np.arange(10, 10 + clips),
        view_ids=np.tile(np.arange(views), clips),
        valid=np.ones(clips, dtype=bool),
    )


class FirstPixels(nn.Module):
    """Logits are pixel values, and the frames are kept to be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, frames_BCTHW: torch.Tensor) -> torch.Tensor:
        self.frames_BCTHW = frames_BCTHW.detach()
        return self.gain * frames_BCTHW[:, 0, 0, 0, :CLASSES]


def make_objective(augment: AugmentConfig | None = None, **config: float) -> Classification:
    return Classification(
        ClassificationConfig(**config),
        augment or AugmentConfig(),
        normalization="imagenet",
        num_classes=CLASSES,
    )


def test_plain_targets_give_the_textbook_loss_and_accuracy():
    batch, objective = make_batch(), make_objective()
    logits, targets = objective.outputs(FirstPixels(), batch, KEY)
    assert torch.equal(targets, torch.eye(CLASSES)[batch.labels_B])
    loss, report = objective.loss((logits, targets))
    p = np.exp(logits.detach().double().numpy())
    own = p[np.arange(3), batch.labels_B.numpy()] / p.sum(axis=1)
    assert float(loss) == pytest.approx(-np.log(own).mean(), abs=1e-6)
    assert float(report["accuracy"]) == pytest.approx((p.argmax(1) == batch.labels_B.numpy()).mean())
    assert not report["accuracy"].requires_grad


def test_every_view_has_its_samples_label():
    batch = make_batch(clips=2, views=3)
    logits, targets = make_objective().outputs(FirstPixels(), batch, KEY)
    assert logits.shape == (6, CLASSES)
    assert targets.argmax(dim=1).tolist() == [0, 0, 0, 1, 1, 1]


def test_smoothed_and_mixed_targets_keep_their_shares():
    objective = make_objective(label_smoothing=0.1, mixup=0.8)
    model, batch = FirstPixels(), make_batch(clips=2)
    _, targets = objective.outputs(model, batch, KEY)
    assert torch.allclose(targets.sum(dim=1), torch.ones(2))
    # Without smoothing's floor a row holds two shares: of the clip's own class and of its partner's.
    own = (targets[0, 0] - 0.025) / 0.9
    assert torch.allclose(targets[1, 1], targets[0, 0]) and 0 < own < 1
    plain = normalize_frames(batch.frames_BTHWC, "imagenet")
    assert torch.allclose(model.frames_BCTHW, own * plain + (1 - own) * plain.flip(0), atol=1e-4)


def test_soft_targets_give_the_cross_entropy_of_shares():
    logits, targets = torch.tensor([[2.0, 0.0, -1.0, 0.5]]), torch.tensor([[0.655, 0.025, 0.295, 0.025]])
    loss, report = make_objective().loss((logits, targets))
    assert float(loss) == pytest.approx(-float((targets * logits.log_softmax(dim=1)).sum()), abs=1e-6)
    assert float(report["accuracy"]) == 1


@pytest.mark.parametrize("augment", [AugmentConfig(erasing_probability=1.0), AugmentConfig(color_jitter=0.5)])
def test_augmentation_is_by_clip_and_view_and_repeats(augment):
    objective, model = make_objective(augment), FirstPixels()
    frames = make_batch(clips=1).frames_BTHWC.repeat(2, 1, 1, 1, 1)
    one = ClipBatch(
        frames, None, torch.zeros(1, dtype=torch.int64), np.array([7]), np.arange(2), np.ones(1, dtype=bool)
    )
    objective.outputs(model, one, KEY)
    first = model.frames_BCTHW
    assert not torch.equal(first[0], first[1]), "views of one clip are augmented apart"
    objective.outputs(model, one, KEY)
    assert torch.equal(model.frames_BCTHW, first)
    objective.outputs(model, one, KEY._replace(step=4))
    assert not torch.equal(model.frames_BCTHW, first)


def test_loss_is_float32_under_autocast():
    objective = make_objective()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, targets = objective.outputs(FirstPixels(), make_batch(), KEY)
        loss, _ = objective.loss((logits, targets))
    assert logits.dtype == targets.dtype == loss.dtype == torch.float32


def test_a_manifest_without_labels_is_refused():
    with pytest.raises(UserError, match="needs labels"):
        make_objective().outputs(FirstPixels(), make_batch(labels=False), KEY)
