"""A running average of the weights, to be evaluated and kept in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from avion_dali.contracts import UserError


class WeightAverage:
    """Exponential moving average of a model's parameters: average <- decay average + (1 - decay) weight.

    It starts as a copy of the weights (Polyak & Juditsky 1992, doi 10.1137/0330046, in exponential form).
    Parameters only: the models here have no running statistics. Averages have the parameters' type and place;
    sharded ones are sharded alike.

    Args:
        model: the bare model, on its device and, where it will be, sharded.
        decay: share of the average that a step keeps, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._weights: dict[str, Tensor] = dict(model.named_parameters())
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in as they are now; called after every optimizer step."""
        averages, weights = list(self._averages.values()), list(self._weights.values())
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the place of the weights for a `with` block; then these are back, bit by bit.

        Costs a second copy of the weights meanwhile. `update` must not be called inside.
        """
        held = [weight.detach().clone() for weight in self._weights.values()]
        self._write(list(self._averages.values()))
        try:
            yield
        finally:
            self._write(held)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, whole also where they are sharded; then every rank must call it."""
        return {name: _whole(average) for name, average in self._averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved averages, exactly.

        Args:
            state: as `state_dict` gave it, of any number of ranks, on any device.

        Raises:
            UserError: the names or shapes are those of another model.
        """
        own = {name: tuple(average.shape) for name, average in self._averages.items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if own != given:
            differing = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise UserError(
                f"the saved weight average is of another model ({', '.join(differing[:3])}); use the model "
                "settings it was trained with, or another output_dir"
            )
        for name, average in self._averages.items():
            average.copy_(_placed_like(average, state[name]))

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights.values(), values, strict=True):
            weight.copy_(value)
        # A sharded model may hold whole weights gathered before; without this it would go on using them.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor, a copy; a collective when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def _placed_like(average: Tensor, full: Tensor) -> Tensor:
    """A full tensor on the average's device, sharded as the average is."""
    full = full.to(average.device, average.dtype)
    if not isinstance(average, DTensor):
        return full
    return distribute_tensor(full, average.device_mesh, average.placements)
