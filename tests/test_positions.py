import pytest
import torch

from avion_dali.models.positions import (
    resize_spatial_positions,
    resize_temporal_embedding,
    sincos_positions,
)


def test_fixed_positions_are_sines_and_cosines_of_falling_frequency():
    table = sincos_positions(5, 768)
    assert table.shape == (5, 768) and table.dtype == torch.float32
    assert torch.allclose(table[1, :4], torch.tensor([0.841471, 0.540302, 0.828431, 0.560091]), atol=1e-6)
    assert torch.equal(table[0], torch.tensor([0.0, 1.0]).repeat(384))
    angle = torch.tensor(3 / 10000 ** (2 * 100 / 768))
    assert torch.allclose(table[3, 200:202], torch.stack([angle.sin(), angle.cos()]), atol=1e-6)


def test_more_frames_lie_between_the_old_ones():
    rows = torch.arange(4.0).unsqueeze(1).expand(4, 3)
    inner = [0.125, 0.375, 0.625, 0.875, 1.125, 1.375, 1.625, 1.875, 2.125, 2.375, 2.625, 2.875]
    expected = torch.tensor([0.0, 0.0, *inner, 3.0, 3.0])
    assert torch.allclose(resize_temporal_embedding(rows, 16)[:, 1], expected)


def test_fewer_frames_are_interpolated_or_cut():
    rows = torch.arange(8.0).unsqueeze(1)
    assert resize_temporal_embedding(rows, 4).flatten().tolist() == [0.5, 2.5, 4.5, 6.5]
    assert resize_temporal_embedding(rows, 4, shrink="truncate").flatten().tolist() == [0, 1, 2, 3]
    assert resize_temporal_embedding(rows, 8) is rows
    with pytest.raises(ValueError, match="0 frames"):
        resize_temporal_embedding(rows, 0)


@pytest.mark.parametrize(("side", "grid"), [(4, 7), (7, 4), (3, 1)])
def test_places_are_resized_as_open_clip_does(side, grid):
    import types

    from open_clip.model import resize_pos_embed

    torch.manual_seed(0)
    positions = torch.randn(1 + side * side, 6)
    state = {"visual.positional_embedding": positions.clone()}
    resize_pos_embed(state, types.SimpleNamespace(visual=types.SimpleNamespace(grid_size=(grid, grid))))
    ours = resize_spatial_positions(positions, grid=grid, extra=1)
    assert torch.allclose(ours, state["visual.positional_embedding"], atol=1e-6)
    assert torch.equal(ours[0], positions[0])
    assert torch.allclose(resize_spatial_positions(positions[1:], grid=grid, extra=0), ours[1:])


def test_places_that_fit_are_kept_and_those_of_no_square_refused():
    positions = torch.randn(10, 6)
    assert resize_spatial_positions(positions, grid=3, extra=1) is positions
    with pytest.raises(ValueError, match="cannot resize positions"):
        resize_spatial_positions(positions, grid=4, extra=0)
    half = resize_spatial_positions(positions.half(), grid=4, extra=1)
    assert half.dtype == torch.float16 and half.shape == (17, 6)
