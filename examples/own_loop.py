"""Train a model of your own on the clips of a manifest, in a loop of your own.

python examples/own_loop.py runs/demo/heldout_manifest --epochs 2
"""

import argparse
import json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", help="folder made by `avion-dali manifest`")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--state", type=Path, default=Path("own_loop.json"), help="where to continue from")
    options = parser.parse_args()

    model = TinyVideoModel(num_frames=4)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = avion_dali.open_clips(
        options.manifest, batch_size=options.batch_size, num_frames=4, frame_size=64, decoder="auto", seed=0
    )
    with loader:
        if options.state.exists():  # an interrupted epoch goes on with the next batch
            loader.load_state_dict(json.loads(options.state.read_text()))
        while loader.state_dict()["epoch"] < options.epochs:
            for batch in loader:
                frames = batch.frames_BTHWC.to(next(model.parameters()).device)
                both = torch.cat([frames, frames.flip(1)])
                is_backwards = torch.cat([torch.zeros(len(frames)), torch.ones(len(frames))]).to(both.device)
                loss = nn.functional.binary_cross_entropy_with_logits(model(both), is_backwards)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                options.state.write_text(json.dumps(loader.state_dict()))
            print(f"epoch {batch.epoch}: loss {loss.item():.3f}, {loader.stats.delivered} clips so far")


# Decoding processes import this file again, so what starts them stands below this line.
if __name__ == "__main__":
    main()
