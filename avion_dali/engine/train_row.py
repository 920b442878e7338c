"""The numbers of a log step, combined over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from avion_dali.engine.host_copy import HostCopy
from avion_dali.engine.timing import WindowTiming
from avion_dali.objectives.gather import gather_rows


class TrainRow:
    """A `train` row of the log, whose numbers may be on their way to the host; every rank must create it.

    The numbers of the last queued step are known only when the device has finished it. Waiting for them would
    leave it without work, so a row is read a step later.

    Args:
        numbers: () tensors of this rank, which are averaged over ranks; the loss is among them.
        timing: timing of this rank; rates are added up, and shares are the largest over ranks.
        counts: counts of this rank, which are added up.
        facts: further entries of the row; one that is None takes a number out of the row.
    """

    def __init__(
        self,
        numbers: Mapping[str, torch.Tensor],
        timing: WindowTiming,
        *,
        counts: Mapping[str, int],
        facts: Mapping[str, Any],
    ) -> None:
        self._names, self._counts, self._timing, self._facts = list(numbers), list(counts), timing, facts
        means_N = torch.stack([value.detach().double() for value in numbers.values()])
        own = [timing.clips_per_s, timing.data_wait_share, timing.gpu_idle_share or 0.0, *counts.values()]
        own_M = torch.tensor(own, dtype=torch.float64).to(means_N.device, non_blocking=True)
        self._over_ranks = HostCopy(gather_rows(torch.cat([means_N, own_M])[None]))

    @property
    def is_immediate(self) -> bool:
        """Whether `values` does not wait."""
        return self._over_ranks.is_immediate

    def values(self) -> dict[str, Any]:
        """Return plain numbers, equal on every rank except `step_s`, `data_wait_s` and `memory_mb`.

        `gpu_idle_share` is absent on the CPU.
        """
        means_RN, rest_RM = self._over_ranks.numbers().tensor_split([len(self._names)], dim=1)
        rates_R, waits_R, idle_R = rest_RM[:, :3].unbind(dim=1)
        on_gpu = self._timing.gpu_idle_share is not None
        counts = rest_RM[:, 3:].sum(dim=0).tolist()
        row = {
            **dict(zip(self._names, means_RN.mean(dim=0).tolist(), strict=True)),
            "clips_per_s": float(rates_R.sum()),
            "clips_per_s_per_rank": float(rates_R.mean()),
            "step_s": self._timing.step_s,
            "data_wait_s": self._timing.data_wait_s,
            "data_wait_share": float(waits_R.max()),
            "gpu_idle_share": float(idle_R.max()) if on_gpu else None,
            "memory_mb": self._timing.memory_mb,
            **{name: int(total) for name, total in zip(self._counts, counts, strict=True)},
            **self._facts,
        }
        return {name: value for name, value in row.items() if value is not None}
