"""A running average of the weights, which is evaluated and exported instead of the current weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from avion_dali.contracts import UserError
from avion_dali.engine.sharding import gathered, placed_like
from avion_dali.wording import few


class WeightAverage:
    """Exponential moving average of a model's parameters: average <- decay average + (1 - decay) weight.

    It starts as a copy of the weights (Polyak & Juditsky 1992, doi 10.1137/0330046, in exponential form).
    Only parameters are averaged, because the models have no running statistics. Each average has the dtype,
    device and sharding of its parameter.

    Args:
        model: the bare model, on its device and already sharded if sharding is configured.
        decay: weight of the old average in each update, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._weights: dict[str, Tensor] = dict(model.named_parameters())
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the current weights; called after every optimizer step."""
        averages, weights = list(self._averages.values()), list(self._weights.values())
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the weights by their averages inside a `with` block, and restore them exactly afterwards.

        A second copy of the weights is held meanwhile. `update` must not be called inside the block.
        """
        held = [weight.detach().clone() for weight in self._weights.values()]
        self._write(list(self._averages.values()))
        try:
            yield
        finally:
            self._write(held)

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Copy the averages as whole tensors; every rank must call it if they are sharded.

        Args:
            keep: whether to return whole tensors; False on ranks that only take part in the collectives and
                whose result is not used.

        Returns:
            Parameter name to average.
        """
        return {name: gathered(average.clone(), keep=keep) for name, average in self._averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved averages, exactly.

        Args:
            state: output of `state_dict`, from any number of ranks, on any device.

        Raises:
            UserError: the names or shapes belong to another model.
        """
        own = {name: tuple(average.shape) for name, average in self._averages.items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if own != given:
            differing = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise UserError(
                f"the saved weight average belongs to another model ({few(differing, 3)}); use the model "
                "settings that it was trained with, or use another output_dir"
            )
        for name, average in self._averages.items():
            average.copy_(placed_like(state[name], average))

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights.values(), values, strict=True):
            weight.copy_(value)
        # A sharded model may still hold gathered weights from before and would continue to use them.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
