"""Read the clips of a manifest through PyTorch's own DataLoader.

python examples/torch_dataloader.py runs/demo/heldout_manifest
"""

import argparse

from torch.utils.data import DataLoader

import avion_dali


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", help="folder made by `avion-dali manifest`")
    parser.add_argument("--start-method", default="spawn", choices=("fork", "spawn", "forkserver"))
    options = parser.parse_args()

    dataset = avion_dali.ClipDataset(options.manifest, num_frames=4, frame_size=64, crop="random-resized")
    loader = DataLoader(
        dataset,
        batch_size=8,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        multiprocessing_context=options.start_method,
        persistent_workers=True,
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)  # other frames and crops; it reaches the running workers too
        for batch in loader:
            frames_BTHWC, texts_BL = batch["frames"], batch.get("tokens")
        has_texts = "no texts" if texts_BL is None else f"texts {tuple(texts_BL.shape)}"
        print(f"epoch {epoch}: frames {tuple(frames_BTHWC.shape)} {frames_BTHWC.dtype}, {has_texts}")


if __name__ == "__main__":
    main()
