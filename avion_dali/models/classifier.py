"""A video tower with a linear head, which classifies clips.

Axes: B clips, C channels, T frames, H W pixels, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from avion_dali.config import ModelConfig
from avion_dali.contracts import UserError
from avion_dali.models.blocks import VideoEncoder
from avion_dali.models.towers import build_video_tower


class Classifier(nn.Module):
    """Video tower, dropout, linear head; parameters are named `visual.*` and `fc_cls.*`."""

    def __init__(self, visual: VideoEncoder, num_classes: int, dropout: float = 0.0) -> None:
        """Add a head to a tower.

        Args:
            visual: a video tower without projection; its `init_head` initializes the head.
            num_classes: number of classes (K).
            dropout: probability that a feature is zeroed in training.

        Raises:
            UserError: when there are no classes.
        """
        super().__init__()
        if num_classes < 1:
            raise UserError("classifier: the manifest has no classes; build it from a dataset with labels")
        self.visual = visual
        self.dropout = nn.Dropout(dropout)
        self.fc_cls = nn.Linear(visual.width, num_classes)
        visual.init_head(self.fc_cls)

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Classify clips: normalized frames, float (B, 3, T, H, W) -> logits, float (B, K)."""
        logits_BK: Tensor = self.fc_cls(self.dropout(self.visual(frames_BCTHW)))
        return logits_BK


def build_classifier(
    config: ModelConfig, *, num_classes: int, num_frames: int, frame_size: int, dropout: float
) -> Classifier:
    """Create a classifier with newly initialized weights.

    Args:
        config: encoder, size and options.
        num_classes: number of classes (K).
        num_frames: frames per clip (T).
        frame_size: side length of a frame in pixels.
        dropout: dropout probability before the head.

    Raises:
        UserError: when the encoder does not support such frames, or there are no classes.
    """
    visual = build_video_tower(config, num_frames=num_frames, frame_size=frame_size, embed_dim=None)
    return Classifier(visual, num_classes, dropout)
