"""Dynamo without a code generator: how often blocks are compiled, and which of them run compiled."""

import dataclasses
import functools

import pytest
import torch

from avion_dali.config import ModelConfig
from avion_dali.models.blocks import VideoTowerConfig
from avion_dali.models.dual_encoder import build_dual_encoder
from avion_dali.models.masked_video import MaskedVideo, build_masked_video
from avion_dali.models.presets import PRESETS
from avion_dali.models.text_tower import TextTower, TextTowerConfig
from avion_dali.models.towers import ENCODERS

LAYERS = 12
TOWER = VideoTowerConfig(
    16, 4, 4, 32, LAYERS, 4, None, drop_path=0.3, drop_path_schedule="linear", compile=True
)


class Counted:
    """A backend that runs graphs as they are and counts them and their calls."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, _: object):
        self.graphs += 1

        def run(*inputs: object) -> object:
            self.calls += 1
            return graph(*inputs)

        return run


@pytest.fixture
def counted(monkeypatch):
    counted = Counted()
    traced = functools.partial(torch.compile, backend=counted)
    monkeypatch.setattr(torch, "compile", lambda call, **_: traced(call))
    torch._dynamo.reset()
    yield counted
    torch._dynamo.reset()


def clips() -> torch.Tensor:
    return torch.randn(6, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_blocks_of_different_drop_path_rates_share_their_code(encoder, counted, monkeypatch):
    """One graph without factors for the first block, whose rate is 0, and one for all others."""
    torch.manual_seed(0)
    tower = ENCODERS[encoder](TOWER)
    torch.manual_seed(1)
    traced = tower(clips())
    assert (counted.graphs, counted.calls) == (2, LAYERS)
    for block in tower.modules():
        block._compiled_call_impl = None
    torch.manual_seed(1)
    assert torch.allclose(traced, tower(clips()), atol=1e-6)
    assert counted.calls == LAYERS


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_the_mode_reaches_every_block(mode, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda call, mode: modes.append(mode) or call)
    config = ModelConfig(size="tiny", compile=True, compile_mode=mode)
    for encoder in ENCODERS:
        build_dual_encoder(dataclasses.replace(config, encoder=encoder), num_frames=2, frame_size=32)
    build_masked_video(
        dataclasses.replace(config, encoder="videomae"), num_frames=2, frame_size=32, decoder_depth=3
    )
    preset = PRESETS["tiny"]
    blocks = len(ENCODERS) * (preset.video_layers + preset.text_layers) + preset.video_layers + 3
    assert modes == [mode] * blocks


def test_masked_video_too(counted):
    model = MaskedVideo(TOWER, decoder_depth=2)
    masks = (torch.arange(32) < 24).expand(6, 32)
    model(clips(), masks)
    assert counted.calls == LAYERS + 2
    assert counted.graphs == 3  # the decoder is narrower and drops nothing


def test_texts_of_all_lengths_share_two_graphs(counted):
    """One for the first length, and one for any."""
    torch.manual_seed(0)
    tower = TextTower(TextTowerConfig(77, 90, 32, LAYERS, 4, 16, compile=True))
    for length in (16, 48, 77, 32, 64):
        tower(torch.arange(2 * length).reshape(2, length) % 90)
    assert (counted.graphs, counted.calls) == (2, 5 * LAYERS)
