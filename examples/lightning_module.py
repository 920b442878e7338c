"""Train a Lightning module on the clips of a manifest.

python examples/lightning_module.py runs/demo/heldout_manifest
"""

import argparse
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

import avion_dali


class FrameOrder(lightning.LightningModule):
    """Learns to tell clips played forwards from clips played backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(3, 16, (2, 7, 7), stride=(1, 4, 4)), nn.GELU())
        self.head = nn.Linear(16, 1)

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        frames_BCTHW = batch["frames"].permute(0, 4, 1, 2, 3).float() / 255
        both = torch.cat([frames_BCTHW, frames_BCTHW.flip(2)])
        logits = self.head(self.encoder(both).mean(dim=(2, 3, 4)))[:, 0]
        is_backwards = torch.arange(2, device=both.device).repeat_interleave(len(frames_BCTHW)).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, is_backwards)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Clips(lightning.LightningDataModule):
    """The clips of a manifest; every epoch draws other frames and crops."""

    def __init__(self, manifest: str) -> None:
        super().__init__()
        self.dataset = avion_dali.ClipDataset(manifest, num_frames=4, frame_size=64)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        self.dataset.set_epoch(self.trainer.current_epoch)
        return DataLoader(
            self.dataset, batch_size=8, shuffle=True, num_workers=2, multiprocessing_context="spawn"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", help="folder made by `avion-dali manifest`")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        reload_dataloaders_every_n_epochs=1,  # so that `set_epoch` is called
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(FrameOrder(), datamodule=Clips(options.manifest))
    print(f"loss {trainer.callback_metrics['loss'].item():.3f}")


if __name__ == "__main__":
    main()
