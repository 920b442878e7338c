"""Errors of the GPU, its driver and memory end a run, and cost no clip its place in it."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from avion_dali.contracts import ChunkRef, ClipPart, ClipRequest, CropWindow, UserError
from avion_dali.loading.clip_group import RowFacts
from avion_dali.loading.faults import LoaderStats
from avion_dali.loading.strategy import PendingBatch, RefusedRowsError
from pipelines.mini_clip import MiniClip
from pipelines.mini_clip_worker import CollectedClip

pytest.importorskip("nvidia.dali")

from pipelines.dali_strategy import DaliStrategy
from pipelines.device_errors import require_fault_of_a_clip

IN_OPERATOR = (
    "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.video`,\nwhich was used in "
    'the pipeline definition with the following traceback:\n\n  File "/cuda/driver/graph.py", line 1\n\n'
    "encountered:\n\n{}\nC++ context: [/opt/dali/cuda_driver_launch.cc:9]\n"
)
OF_CLIPS = [
    'Assert on "frames_decoders_[s]->IsValid()" failed: Failed to create video decoder for "memory file"',
    "Codec configuration not supported on this GPU. Codec: HEVC, chroma format: YUV 4:2:2, bit depth: 10",
    "Video is too small in at least one dimension. Provided: 32x32 vs supported:48x16",
    "Unexpected out-of-bounds frame index",
    "CUDA driver API error CUDA_ERROR_INVALID_VALUE (1):\ninvalid argument",
    "CUDA driver API error CUDA_ERROR_INVALID_IMAGE (200):\ndevice kernel image is invalid",
]
OF_MEMORY = [
    "CUDA allocation failed",
    "Can't allocate 452984832 bytes on device 0.",
    "CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):\nout of memory",
    "std::bad_alloc",
]
OF_THE_DEVICE = [
    "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered",
    "CUDA runtime API error cudaErrorLaunchFailure (719):\nunspecified launch failure",
    "CUDA runtime API error cudaErrorInvalidValue (1):\ninvalid argument",
    "CUDA driver API error CUDA_ERROR_ECC_UNCORRECTABLE (214)",
    "CUDA driver API error CUDA_ERROR_DEINITIALIZED (4):\ndriver shutting down",
    "CUDA driver API error CUDA_ERROR_NO_DEVICE (100)",
]


@pytest.mark.parametrize("cause", OF_CLIPS)
def test_what_a_stream_causes_is_a_clips(cause: str) -> None:
    require_fault_of_a_clip(RuntimeError(IN_OPERATOR.format(cause)))


@pytest.mark.parametrize(
    "error",
    [
        *(RuntimeError(IN_OPERATOR.format(cause)) for cause in OF_MEMORY),
        MemoryError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_memory_names_the_settings_to_lower(error: BaseException) -> None:
    with pytest.raises(UserError, match="out of memory: .*lower `batch_size`, or `graphs`") as caught:
        require_fault_of_a_clip(error)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        *(RuntimeError(IN_OPERATOR.format(cause)) for cause in OF_THE_DEVICE),
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."),
    ],
)
def test_the_device_is_named(error: RuntimeError) -> None:
    with pytest.raises(RuntimeError, match="the GPU or its driver failed, and not a clip: CUDA") as caught:
        require_fault_of_a_clip(error)
    assert caught.value.__cause__ is error


def test_what_no_operator_raises_is_raised_again() -> None:
    error = RuntimeError("no batch is queued; call put before take")
    with pytest.raises(RuntimeError) as caught:
        require_fault_of_a_clip(error)
    assert caught.value is error


class FakeGraph:
    """Takes batches as `GraphRunner` does and fails as told; decodes nothing."""

    def __init__(self, fail: Callable[[list[int]], BaseException | None]) -> None:
        self.fail, self.queued = fail, []

    def put(self, inputs: Sequence[Any]) -> None:
        self.queued.append([int(number) for number in inputs[-1]])

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.queued.pop(0)
        if (error := self.fail(ids)) is not None:
            raise error
        return torch.zeros(len(ids), 1, 1, 8, 8, 3, dtype=torch.uint8), torch.tensor(ids)


def strategy_with(fail: Callable[[list[int]], BaseException | None], rows: int) -> DaliStrategy:
    """A strategy whose graphs are `FakeGraph`s."""
    strategy = DaliStrategy(num_graphs=2, num_threads=1)
    strategy._device, strategy._stats = torch.device("cpu"), LoaderStats()
    strategy._slots = [np.zeros((rows, 1, 1, 8, 8, 3), np.uint8)]
    strategy._graphs = [FakeGraph(fail), FakeGraph(fail)]
    strategy._turns = iter(strategy._graphs)
    strategy.__dict__["_one_clip_graph"] = FakeGraph(fail)
    return strategy


def batch_of(paths: Sequence[str]) -> PendingBatch[CollectedClip]:
    window = CropWindow(0, 0, 8, 8)
    parts = [ClipPart(ChunkRef(path, 1, 1, 8, 8), (0,)) for path in paths]
    requests = [ClipRequest(i, 0, (part,), (0,), (window,), (False,), 8) for i, part in enumerate(parts)]
    batch = PendingBatch[CollectedClip](0, 0, 0, list(range(len(paths))), RowFacts.of(requests, 0))
    batch.results = [CollectedClip(request, MiniClip(b"x", (0,), 6), 0, 0.0) for request in requests]
    return batch


def refused(*bad: int) -> Callable[[list[int]], BaseException | None]:
    error = RuntimeError(IN_OPERATOR.format(OF_CLIPS[0]))
    return lambda ids: error if set(ids) & set(bad) else None


def test_bad_clips_are_found_among_good_ones() -> None:
    strategy, batch = strategy_with(refused(1, 4), 5), batch_of("abcde")
    strategy.start(batch)
    with pytest.raises(RefusedRowsError) as caught:
        strategy.frames(batch)
    assert caught.value.failures.keys() == {1, 4}
    assert {failure.kind for failure in caught.value.failures.values()} == {"corrupt"}


@pytest.mark.parametrize(("paths", "means"), [("aabbcc", "clips"), ("abcdab", "more")])
def test_when_all_clips_fail_alone(paths: str, means: str) -> None:
    """Three damaged files, or something that is not the clips' fault at all."""
    strategy, batch = strategy_with(refused(*range(6)), 6), batch_of(paths)
    strategy.start(batch)
    expected = (
        (RefusedRowsError, "corrupt")
        if means == "clips"
        else (RuntimeError, "from 4 files, so the clips are not")
    )
    with pytest.raises(expected[0], match=expected[1]):
        strategy.frames(batch)


@pytest.mark.parametrize("alone", [False, True], ids=["in the batch", "when decoded alone"])
@pytest.mark.parametrize(
    ("cause", "raised", "message"),
    [
        (OF_MEMORY[0], UserError, "lower `batch_size`"),
        (OF_THE_DEVICE[0], RuntimeError, "and not a clip: CUDA runtime API error"),
    ],
)
def test_no_clip_is_blamed_for_the_device(
    cause: str, raised: type[Exception], message: str, alone: bool
) -> None:
    def fail(ids: list[int]) -> BaseException:
        clips = alone and len(ids) > 1
        return RuntimeError(IN_OPERATOR.format(OF_CLIPS[0] if clips else cause))

    strategy, batch = strategy_with(fail, 4), batch_of("aabb")
    strategy.start(batch)
    with pytest.raises(raised, match=message):
        strategy.frames(batch)
    assert strategy._stats.failures == Counter()


def test_batches_go_to_the_graphs_in_turn() -> None:
    strategy = strategy_with(lambda ids: None, 1)
    first, second = strategy._graphs
    empty = batch_of("a")
    empty.results = [None]
    for batch in (batch_of("a"), empty, batch_of("a")):
        strategy.start(batch)
    assert (len(first.queued), len(second.queued)) == (1, 1)
