"""Video clips for training, from CPU cores or NVDEC, and the training of large video models on one machine.

- `open_clips` delivers batches of clips of a manifest to any training loop.
- `ClipDataset` delivers the same clips to `torch.utils.data.DataLoader`.
- `decode_clip` decodes selected frames of any video file.

Importing this package imports neither PyTorch nor DALI; each name is imported when it is first used.
"""

from importlib import import_module

# Not from `typing`: until `__main__` has run, that name may lead to a file of the working directory.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from avion_dali.assembly.clip_dataset import ClipDataset
    from avion_dali.assembly.open_clips import open_clips
    from avion_dali.contracts import DecodeError, UserError
    from avion_dali.decode.video_clip import decode_clip
    from avion_dali.loading.clip_loader import ClipLoader

__version__ = "0.1.0"
__all__ = ["ClipDataset", "ClipLoader", "DecodeError", "UserError", "__version__", "decode_clip", "open_clips"]

_HOMES = {
    "ClipDataset": "avion_dali.assembly.clip_dataset",
    "ClipLoader": "avion_dali.loading.clip_loader",
    "DecodeError": "avion_dali.contracts",
    "UserError": "avion_dali.contracts",
    "decode_clip": "avion_dali.decode.video_clip",
    "open_clips": "avion_dali.assembly.open_clips",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
