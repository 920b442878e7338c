"""Train your own model on the clips of a manifest, in your own loop, and continue where it was interrupted.

python examples/own_loop.py runs/demo/heldout_manifest --epochs 2
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import avion_dali


class TinyVideoModel(nn.Module):
    """Predicts whether a clip is played forwards or backwards from the means of its frames."""

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(num_frames * 3 * 16, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        frames_BTCHW = frames_BTHWC.permute(0, 1, 4, 2, 3).float() / 255
        cells_BTC44 = nn.functional.adaptive_avg_pool2d(frames_BTCHW.flatten(0, 1), 4)
        return self.head(cells_BTC44.reshape(len(frames_BTHWC), -1))[:, 0]


def loss_of(model: nn.Module, frames_BTHWC: torch.Tensor) -> torch.Tensor:
    both = torch.cat([frames_BTHWC, frames_BTHWC.flip(1)])
    is_backwards = torch.arange(2, device=both.device).repeat_interleave(len(frames_BTHWC)).float()
    return nn.functional.binary_cross_entropy_with_logits(model(both), is_backwards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", help="folder made by `avion-dali manifest`")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path, default=Path("own_loop.pt"))
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TinyVideoModel(num_frames=4).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    with avion_dali.open_clips(
        options.manifest, batch_size=options.batch_size, num_frames=4, frame_size=64, device=device
    ) as loader:
        parts = {"model": model, "optimizer": optimizer, "loader": loader}
        if options.checkpoint.exists():  # an interrupted epoch continues with the next batch
            for name, state in torch.load(options.checkpoint, weights_only=True).items():
                parts[name].load_state_dict(state)
        while loader.state_dict()["epoch"] < options.epochs:
            for batch in loader:
                loss = loss_of(model, batch.frames_BTHWC)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                torch.save({name: part.state_dict() for name, part in parts.items()}, options.checkpoint)
            print(f"epoch {batch.epoch}: loss {loss.item():.3f}, {loader.stats.delivered} clips so far")


# Decoding processes import this file again, so what starts them stands below this line.
if __name__ == "__main__":
    main()
