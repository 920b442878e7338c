"""Averages numbers over the clips and views of each sample, across batches and ranks.

Axes: B samples of a batch, V views of a clip, S samples of the evaluation, X numbers per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avion_dali.contracts import ClipBatch
from avion_dali.engine.distributed import all_gather_rows


@dataclass(frozen=True)
class PerSample:
    """Means per sample, gathered from all ranks; the same on every rank.

    Args:
        sample_ids: int64 (S,), increasing; samples with at least one readable clip.
        means_SX: float32 (S, X), mean over a sample's clips and views.
        labels: int64 (S,), class of each sample, -1 for none.
        unreadable: number of clips that could not be read; the means exclude them.
    """

    sample_ids: np.ndarray
    means_SX: np.ndarray
    labels: np.ndarray
    unreadable: int


class SampleSums:
    """Adds up rows of numbers per sample, so that memory grows with samples and not with clips or views."""

    def __init__(self) -> None:
        self._sums: dict[int, np.ndarray] = {}
        self._counts: dict[int, int] = {}
        self._labels: dict[int, int] = {}
        self._unreadable = 0

    def add(self, batch: ClipBatch, values_BX: Tensor) -> None:
        """Add a batch's numbers; invalid rows are counted and otherwise ignored.

        Args:
            batch: B samples of V views each; a sample may occur in several batches with different clips.
            values_BX: float (B*V, X), row b*V + v.
        """
        views = len(batch.view_ids) // max(len(batch), 1)
        sums_BX = values_BX.float().unflatten(0, (len(batch), views)).sum(dim=1).cpu().numpy()
        labels = np.full(len(batch), -1) if batch.labels_B is None else batch.labels_B.cpu().numpy()
        self._unreadable += int((~batch.valid).sum())
        for row in np.flatnonzero(batch.valid):
            sample = int(batch.sample_ids[row])
            if sample in self._sums:
                self._sums[sample] += sums_BX[row]
            else:
                self._sums[sample] = sums_BX[row].copy()
            self._counts[sample] = self._counts.get(sample, 0) + views
            self._labels[sample] = int(labels[row])

    def gather(self, device: torch.device) -> PerSample:
        """Average over all ranks and clear this rank's sums; every rank must call it once.

        Args:
            device: device of the process group's tensors.

        Returns:
            The means, the same on every rank; empty if no rank has read a clip.
        """
        facts = np.array(
            [(sample, count, self._labels[sample]) for sample, count in self._counts.items()], dtype=np.int64
        ).reshape(-1, 3)
        width = next((len(values) for values in self._sums.values()), 0)
        # A rank without samples does not know how many numbers the others have per sample.
        width = int(all_gather_rows(torch.tensor([width], device=device)).max())
        own = np.stack(list(self._sums.values())) if self._sums else np.zeros((0, width), np.float32)
        self._sums.clear()
        facts_S3 = all_gather_rows(torch.from_numpy(facts).to(device)).cpu().numpy()
        sums_SX = all_gather_rows(torch.from_numpy(own).to(device)).cpu().numpy()
        unreadable = int(all_gather_rows(torch.tensor([self._unreadable], device=device)).sum())
        # A sample's clips may be on several ranks, so sums with equal ids are added.
        ids, first, place = np.unique(facts_S3[:, 0], return_index=True, return_inverse=True)
        means_SX = np.zeros((len(ids), width), dtype=np.float32)
        np.add.at(means_SX, place, sums_SX)
        means_SX /= np.bincount(place, weights=facts_S3[:, 1], minlength=len(ids))[:, None]
        return PerSample(ids, means_SX, facts_S3[first, 2], unreadable)
