"""The checks that stand at every border between rooms, and what a worker's import costs."""

import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from avion_dali.contracts import (
    ChunkRef,
    ClipBatch,
    ClipError,
    ClipPart,
    ClipRequest,
    CropWindow,
    DecodeError,
)

CHUNK = ChunkRef("/chunks/a/0.mp4", 1000, 10, 64, 48)
WINDOW = CropWindow(0, 0, 48, 48)


def request(**changes) -> ClipRequest:
    fields = {
        "sample_id": 3,
        "epoch": 1,
        "parts": (ClipPart(CHUNK, (1, 4)), ClipPart(replace(CHUNK, path="/chunks/a/15.mp4"), (0,))),
        "gather": (0, 1, 1, 2),
        "windows": (WINDOW, CropWindow(16, 0, 48, 48)),
        "flips": (False, True),
        "frame_size": 32,
        "tokens": (49406, 49407),
    }
    return ClipRequest(**(fields | changes))


def batch(**changes) -> ClipBatch:
    fields = {
        "frames_BTHWC": torch.zeros(4, 2, 8, 8, 3, dtype=torch.uint8),
        "tokens_BL": torch.zeros(2, 5, dtype=torch.int64),
        "labels_B": None,
        "sample_ids": np.arange(2),
        "view_ids": np.array([0, 1, 0, 1]),
        "valid": np.ones(2, dtype=bool),
    }
    return ClipBatch(**(fields | changes))


def test_contracts_load_neither_torch_nor_pyarrow() -> None:
    code = "import sys, avion_dali.contracts; print({'torch', 'pyarrow', 'open_clip'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "numbers",
    [
        (1, 0, 8, 8),
        (0, 1, 8, 8),
        (0, 0, 7, 8),
        (0, 0, 8, 7),
        (-2, 0, 8, 8),
        (0, -2, 8, 8),
        (0, 0, 0, 8),
        (0, 0, 8, -2),
    ],
)
def test_windows_off_the_even_grid_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="crop window"):
        CropWindow(*numbers)


def test_smallest_window_is_allowed_and_cannot_be_changed() -> None:
    window = CropWindow(0, 0, 2, 2)
    with pytest.raises(FrozenInstanceError):
        window.x = 2


@pytest.mark.parametrize("ids", [(), (3, 2), (2, 2), (-1, 0), (0, 10)])
def test_bad_frame_ids_are_refused_with_the_path(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"/chunks/a/0\.mp4"):
        ClipPart(CHUNK, ids)


def test_first_and_last_frame_are_allowed() -> None:
    assert ClipPart(CHUNK, (0, 9)).frame_ids == (0, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gather": ()}, "gather"),
        ({"gather": (0, 3)}, "3 frames"),
        ({"gather": (-1, 0)}, "gather"),
        ({"parts": ()}, "0 frames"),
        ({"windows": (), "flips": ()}, "windows"),
        ({"flips": (True,)}, "2 windows"),
        ({"windows": (WINDOW, CropWindow(18, 0, 48, 48))}, "leaves"),
        ({"windows": (WINDOW, CropWindow(0, 2, 32, 48))}, "leaves"),
    ],
)
def test_requests_whose_parts_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**changes)


def test_a_window_may_be_the_whole_frame() -> None:
    assert request(windows=(CropWindow(0, 0, 64, 48),), flips=(False,)).frames_shape[0] == 1


def test_window_must_fit_every_chunk_of_the_clip() -> None:
    small = ClipPart(replace(CHUNK, path="/chunks/small.mp4", width=32), (0,))
    with pytest.raises(ValueError, match=r"/chunks/small\.mp4 \(32x48\)"):
        request(parts=(ClipPart(CHUNK, (1, 4)), small))


def test_request_shape_equality_and_pickle() -> None:
    asked = request()
    assert asked.frames_shape == (2, 4, 32, 32, 3)
    assert pickle.loads(pickle.dumps(asked)) == asked
    assert hash(pickle.loads(pickle.dumps(asked))) == hash(asked)
    assert request(gather=(0, 1, 2, 2)) != asked


def test_decode_error_survives_pickling_and_tells_everything() -> None:
    error = DecodeError("/chunks/a/0.mp4", (1, 4), decoder="cpu-fused", kind="corrupt", cause="bad slice")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is DecodeError
    assert (copy.path, copy.frame_ids, copy.decoder, copy.kind, copy.cause) == (
        "/chunks/a/0.mp4",
        (1, 4),
        "cpu-fused",
        "corrupt",
        "bad slice",
    )
    assert str(copy) == str(error)
    for word in ("/chunks/a/0.mp4", "corrupt", "bad slice", "cpu-fused", "[1, 4]"):
        assert word in str(error)


def test_batch_length_counts_clips_not_views() -> None:
    assert len(batch()) == 2
    assert batch().errors == ()
    errors = (ClipError(1, 0, "missing", "/x", (0,), "gone", 5),)
    assert batch(errors=errors).errors == errors


def test_empty_batch_is_allowed() -> None:
    empty = batch(
        frames_BTHWC=torch.zeros(0, 2, 8, 8, 3, dtype=torch.uint8),
        tokens_BL=None,
        sample_ids=np.arange(0),
        view_ids=np.arange(0),
        valid=np.ones(0, dtype=bool),
    )
    assert len(empty) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames_BTHWC": torch.zeros(4, 2, 8, 8, 3)}, "uint8"),
        ({"frames_BTHWC": torch.zeros(4, 3, 2, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"frames_BTHWC": torch.zeros(4, 8, 8, 3, dtype=torch.uint8)}, "uint8"),
        ({"frames_BTHWC": torch.zeros(2, 2, 8, 8, 3, dtype=torch.uint8)}, "do not fit"),
        ({"view_ids": np.arange(3)}, "do not fit"),
        ({"valid": np.ones(4, dtype=bool)}, "do not fit"),
        ({"tokens_BL": torch.zeros(4, 5, dtype=torch.int64)}, "tokens_BL"),
        ({"labels_B": torch.zeros(3, dtype=torch.int64)}, "labels_B"),
    ],
)
def test_batches_whose_rows_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch(**changes)


def test_views_must_be_a_multiple_of_clips() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        batch(frames_BTHWC=torch.zeros(3, 2, 8, 8, 3, dtype=torch.uint8), view_ids=np.arange(3))
