"""The clips of a manifest as a map-style dataset, for `torch.utils.data.DataLoader` and frameworks that use it.

Axes: V views of a clip, T frames, H W pixels, C channels, L text tokens.
"""

from __future__ import annotations

import logging
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avion_dali.assembly.decoder_choice import require_decoder
from avion_dali.assembly.open_clips import ClipKeywords, default_context_length, require_common
from avion_dali.config import ClipOptions
from avion_dali.config.checks import require, require_integer
from avion_dali.contracts import ClipError, ClipRequest, DecodeError, UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.data.tokens import pad_tokens
from avion_dali.decode.cpu_fused import one_thread
from avion_dali.decode.decoders import CPU_DECODERS
from avion_dali.loading.faults import MAX_ATTEMPTS, FaultPolicy, failure_of
from avion_dali.loading.worker import failures_as_decode_errors

if TYPE_CHECKING:
    from typing_extensions import Unpack

_log = logging.getLogger(__name__)


class ClipDataset(Dataset[dict[str, Any]]):
    """One clip per row of a manifest, decoded on the CPU in the calling process.

    Item `i` of an epoch is bit-identical to the clip that `open_clips` with the same options delivers for row
    `i` in that epoch. The dataset can be pickled, so it works with every start method of processes.
    Threads that call it decode one after another; processes decode at the same time.

    An item is a dictionary:

    - `frames`: uint8 tensor (T, H, W, 3), RGB; (V, T, H, W, 3) if clips have several views.
    - `sample_id`: row of the manifest; if the row could not be read, that of its substitute.
    - `label`: class index, or -1.
    - `caption_id`: index of the caption that the text is, or -1.
    - `tokens`: int64 tensor (L,) of token ids, zero padded; only if `context_length` is not 0.
    - `valid`: False for an evaluation clip that could not be read; its frames are zeros.

    Args:
        manifest: folder made by `avion-dali manifest`, or an opened manifest.
        num_frames: frames per clip (T).
        frame_size: side length of the square frames in pixels.
        decoder: `cpu-fused`, `paper-fused` or `reference`.
        seed: determines every random choice.
        training: True draws clips at random and replaces unreadable clips by substitutes, as `open_clips` does;
            False uses fixed clips, `eval_clips` per row.
        context_length: tokens per text (L), 2 to 1024, or 0 for no tokens; by default 77 if the manifest has
            texts.
        max_bad_fraction: fraction of the rows that may be unreadable before a `UserError` is raised; each
            process counts separately.
        **options: the other fields of `avion_dali.config.ClipOptions`.

    Raises:
        UserError: when the manifest or an option cannot be used.
    """

    def __init__(
        self,
        manifest: str | Path | Manifest,
        *,
        num_frames: int = 4,
        frame_size: int = 224,
        decoder: str = "cpu-fused",
        seed: int = 0,
        training: bool = True,
        context_length: int | None = None,
        max_bad_fraction: float = 0.01,
        **options: Unpack[ClipKeywords],
    ) -> None:
        require_common(manifest, seed=seed, training=training, context_length=context_length)
        if unknown := sorted(options.keys() - ClipKeywords.__annotations__.keys()):
            raise TypeError(f"ClipDataset() has no keyword {', '.join(unknown)}")
        is_share = isinstance(max_bad_fraction, (int, float)) and 0 <= max_bad_fraction <= 1
        require(is_share, "`max_bad_fraction`", value=max_bad_fraction, allowed="in [0, 1]")
        opened = manifest if isinstance(manifest, Manifest) else Manifest(manifest)
        require_decoder(decoder, choices=CPU_DECODERS)
        if decoder not in CPU_DECODERS:
            raise UserError(
                f"`decoder` = {decoder!r} does not run in the processes of a DataLoader; choose one of "
                f"{', '.join(CPU_DECODERS)}, or use open_clips, which supports dali"
            )
        chosen = ClipOptions(num_frames=num_frames, frame_size=frame_size, **options)
        self.decoder, self.training = decoder, training
        self._planner = Planner(opened, ClipRules.from_options(chosen, training=training), seed=seed)
        self._context_length = default_context_length(opened) if context_length is None else context_length
        # In shared memory, so that `set_epoch` reaches the persistent processes of a DataLoader.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._faults = FaultPolicy(
            opened.num_samples, max_bad_fraction=max_bad_fraction, seed=seed, quarantine=None
        )

    def __len__(self) -> int:
        """Number of clips: the rows of the manifest, times `eval_clips` in an evaluation."""
        return self._planner.num_clips

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch whose clips are drawn from now on, in all processes.

        Args:
            epoch: epoch number, >= 0.

        Raises:
            UserError: when it is no such number.
        """
        require_integer(epoch, "`epoch`", least=0)
        self._epoch.fill_(int(epoch))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decode one clip; the class describes the item.

        Args:
            index: in [0, len).

        Raises:
            IndexError: when there is no such clip.
            UserError: when too many clips cannot be read.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        epoch = int(self._epoch)
        request = self._planner.plan(index, epoch)
        for attempt in range(MAX_ATTEMPTS + 1):
            frames_VTHWC = np.zeros(request.frames_shape, np.uint8)
            failure = self._decode(request, frames_VTHWC)
            if failure is None:
                return self._item(request, frames_VTHWC)
            self._faults.record(failure)
            if not self.training:
                frames_VTHWC[:] = 0
                return self._item(request, frames_VTHWC, valid=False)
            if attempt == MAX_ATTEMPTS:
                raise self._faults.exhausted(failure)
            request = self._planner.plan(self._faults.substitute(index, epoch, attempt), epoch)
        raise AssertionError("every attempt returns or raises")

    def _decode(self, request: ClipRequest, frames_VTHWC: np.ndarray) -> ClipError | None:
        try:
            with one_thread(), failures_as_decode_errors(request, decoder=self.decoder):
                CPU_DECODERS[self.decoder](request, frames_VTHWC)
        except DecodeError as error:
            _log.warning("a clip could not be read: %s", error)
            return failure_of(error, request)
        return None

    def _item(self, request: ClipRequest, frames_VTHWC: np.ndarray, *, valid: bool = True) -> dict[str, Any]:
        frames = torch.from_numpy(frames_VTHWC)
        item: dict[str, Any] = {
            "frames": frames[0] if len(frames) == 1 else frames,
            "sample_id": request.sample_id,
            "label": request.label,
            "caption_id": request.caption_id,
            "valid": valid,
        }
        if self._context_length:
            item["tokens"] = torch.from_numpy(pad_tokens([request.tokens], self._context_length)[0])
        return item
