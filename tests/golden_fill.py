"""Deterministic weights and inputs, for outputs that were computed elsewhere with the same."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).parent
TOWERS = json.loads((FOLDER / "golden_towers_tiny.json").read_text())


def filled(key: str, shape: torch.Size) -> torch.Tensor:
    """A wave whose phase comes from the parameter's name; norms' weights swing around 1."""
    base = 1.0 if len(shape) == 1 and key.endswith(".weight") else 0.0
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (base + 0.05 * torch.sin(0.7 * index + sum(key.encode()) % 97)).float().reshape(shape)


def fill_model(model: nn.Module, rename: Callable[[str], str] = str) -> nn.Module:
    """Give a model the weights that belong to its parameters' names elsewhere, and set it to evaluation."""
    weights = {key: filled(rename(key), tensor.shape) for key, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    return model.eval()


def wave(*shape: int) -> torch.Tensor:
    return torch.sin(0.013 * torch.arange(math.prod(shape), dtype=torch.float64)).float().reshape(shape)


def videomae_flash_name(key: str) -> str:
    """The name of one of our VideoMAE parameters in AVION's files that were trained with flash attention."""
    return key.replace("attn.qkv", "attn.Wqkv").replace("attn.proj", "attn.out_proj")


def shape_table(name: str) -> dict[str, tuple[int, ...]]:
    """A published model's parameter shapes; a row with `*` stands for one row per block."""
    table = json.loads((FOLDER / "tower_shapes.json").read_text())[name]
    shapes = {}
    for key, shape in table["shapes"].items():
        blocks = range(table["layers"][key.split(".*")[0]]) if ".*." in key else range(1)
        shapes.update({key.replace("*", str(i)): tuple(shape) for i in blocks})
    return shapes


def close(ours: torch.Tensor, expected: list[float]) -> bool:
    return torch.allclose(ours.detach().flatten(), torch.tensor(expected), atol=1e-4, rtol=0)
