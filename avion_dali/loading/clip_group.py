"""What a worker does in one task: it plans and decodes a group of clips for neighboring rows of a micro-batch.

The worker plans the clips itself, because planning takes longer than all that the trainer has to do for a clip,
and it does several in one task, because a task costs the trainer more than a clip. It opens the planner of a
loader once; pyarrow, which reads the manifest, adds 8 MB and a tenth of a second to each worker. This module
never imports torch.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from avion_dali.contracts import ClipRequest, DecodeError
from avion_dali.data.planner import Planner
from avion_dali.data.tokens import pad_tokens
from avion_dali.loading.pool import still_working
from avion_dali.loading.ring import Place

MAX_CLIPS = 8
_GROUPS_PER_WORKER = 3
_PROGRESS_S = 1.0  # between two messages of a group that takes long
_TOKENS = 3  # first column of tokens in `RowFacts`


class ClipGroup(NamedTuple):
    """Clips of one micro-batch; a tuple, which is pickled faster than a dataclass.

    Args:
        planner: the pickled planner, which each worker opens once.
        epoch: epoch of the clips.
        clips: indices of the clips, for `Planner.plan`.
        place: place of the first clip in shared memory; the others follow it.
        context_length: text tokens per row (L).
    """

    planner: bytes
    epoch: int
    clips: Sequence[int]
    place: Place
    context_length: int


class GroupResult(NamedTuple):
    """What became of a group.

    Args:
        facts_RF: int64 (rows, 3 + L), see `RowFacts`.
        results: the result of each clip's task; None for one that failed.
        failures: why clips failed, by their number in the group.
    """

    facts_RF: np.ndarray
    results: list[Any]
    failures: dict[int, DecodeError]


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What a batch carries of its requests besides frames.

    Args:
        values_RF: int64 (rows, 3 + L): sample id, label, caption id and zero-padded text tokens.
    """

    values_RF: np.ndarray

    @classmethod
    def empty(cls, rows: int, context_length: int) -> RowFacts:
        """Make room for the facts of some rows.

        Args:
            rows: number of rows.
            context_length: L.
        """
        return cls(np.empty((rows, _TOKENS + context_length), np.int64))

    @classmethod
    def of(cls, requests: Sequence[ClipRequest], context_length: int) -> RowFacts:
        """Collect the facts of requests.

        Args:
            requests: one per row.
            context_length: L.
        """
        facts = cls.empty(len(requests), context_length)
        for row, request in zip(facts.values_RF, requests, strict=True):
            row[:_TOKENS] = request.sample_id, request.label, request.caption_id
        if context_length:
            facts.values_RF[:, _TOKENS:] = pad_tokens([request.tokens for request in requests], context_length)
        return facts

    @property
    def sample_ids(self) -> np.ndarray:
        """int64 (rows,), the manifest row of each clip."""
        return self.values_RF[:, 0].copy()

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (rows,) of class indices, or None if no row has one."""
        return self._ids(1)

    @property
    def caption_ids(self) -> np.ndarray | None:
        """int64 (rows,) of caption ids, or None if no row has one."""
        return self._ids(2)

    @property
    def tokens(self) -> np.ndarray | None:
        """int64 (rows, L) of text tokens, or None if L is 0."""
        tokens_RL = self.values_RF[:, _TOKENS:]
        return tokens_RL.copy() if tokens_RL.shape[1] else None

    def _ids(self, column: int) -> np.ndarray | None:
        ids_R = self.values_RF[:, column]
        return ids_R.copy() if (ids_R >= 0).any() else None


def clips_per_group(clips_ahead: int, workers: int) -> int:
    """Return the size of groups that keeps all workers busy.

    Args:
        clips_ahead: clips under way at a time.
        workers: number of workers.
    """
    return max(1, min(MAX_CLIPS, clips_ahead // (_GROUPS_PER_WORKER * workers)))


def work_on(task: Callable[[ClipRequest, Place], Any], group: ClipGroup) -> GroupResult:
    """Plan the clips of a group and do a task for each; a clip that cannot be read fails alone.

    Args:
        task: the task of a `LoaderStrategy`.
        group: the clips.

    Raises:
        UserError: when the manifest has been replaced since the loader was opened, or a clip cannot be planned.
    """
    planner, told = _opened(group.planner), time.monotonic()
    requests, results, failures = list[ClipRequest](), list[Any](), dict[int, DecodeError]()
    for number, clip in enumerate(group.clips):
        request = planner.plan(clip, group.epoch)
        place = group.place._replace(offset=group.place.offset + number * group.place.num_bytes)
        requests.append(request)
        try:
            results.append(task(request, place))
        except DecodeError as error:
            results.append(None)
            failures[number] = error
        if time.monotonic() - told > _PROGRESS_S:
            still_working()
            told = time.monotonic()
    return GroupResult(RowFacts.of(requests, group.context_length).values_RF, results, failures)


# A run has two loaders, for training and evaluation.
_opened: Callable[[bytes], Planner] = lru_cache(maxsize=4)(pickle.loads)
