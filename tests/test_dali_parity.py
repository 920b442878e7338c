"""`--decoder dali` delivers the clips of `--decoder cpu-fused`: 500 requests through both loaders."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import av
import make_videos
import numpy as np
import pytest
from dali_clips import MJPEG, VP9, FixedPlanner, clip_request, draw_noisy, draw_soft, epoch, loader_of
from test_source import indexed_ref

from avion_dali.contracts import ChunkRef, ClipRequest
from avion_dali.loading.pool import WorkerPool
from benchmarks import media

pytest.importorskip("nvidia.dali")

from test_graph import assert_close, border_windows

SIZE, FRAMES = (192, 144), 48
ENDINGS = {"vp9": ("mp4", VP9), "mjpeg": ("mov", MJPEG)}
Chunks = dict[tuple[str, str], list[ChunkRef]]  # by codec and content; of two consecutive chunks


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(workers=1, timeout_s=60) as pool:
        yield pool


@pytest.fixture(scope="module")
def chunks(moving_video: Path, tmp_path_factory: pytest.TempPathFactory) -> Chunks:
    """Two chunks of each content in each codec, numbered on from the first to the second."""
    folder = tmp_path_factory.mktemp("parity")
    draws = {"soft": draw_soft, "noisy": draw_noisy}
    sources = {name: (SIZE, draw) for name, draw in draws.items()}
    filmed = [moving_video, *media.extra_videos()[0]]
    sources |= {path.stem: filmed_source(path) for path in filmed}
    found: Chunks = {}
    for codec, (ending, how) in ENDINGS.items():
        for name, (size, draw) in sources.items():
            paths = [
                make_videos.write_video(
                    folder / f"{codec}_{name}_{first}.{ending}",
                    frames=FRAMES,
                    size=size,
                    draw=draw,
                    first_number=first,
                    **how,
                )
                for first in (0, FRAMES)
            ]
            found[codec, name] = [indexed_ref(path, folder) for path in paths]
    return found


def filmed_source(path: Path) -> tuple[tuple[int, int], object]:
    """Size of a video, to even numbers, and a function that gives its pictures."""
    with av.open(str(path)) as container:
        decoded = container.decode(container.streams.best("video"))
        pictures = [frame.to_ndarray(format="rgb24") for frame in islice(decoded, 0, 2 * FRAMES)]
    height, width = (side // 2 * 2 for side in pictures[0].shape[:2])
    return (width, height), lambda number, _: np.ascontiguousarray(pictures[number][:height, :width])


def frames_of(rng: np.random.Generator, chunks: Sequence[ChunkRef], num_frames: int) -> dict:
    """Parts and gather of a random clip: of one chunk or across both, neighbours or far apart, with repeats."""
    across = rng.random() < 0.4
    parts = []
    for chunk, share in zip(chunks, (num_frames // 2, num_frames - num_frames // 2), strict=True):
        count = share if across else num_frames
        span = int(rng.integers(count, FRAMES + 1))
        first = int(rng.integers(0, FRAMES - span + 1))
        ids = sorted((first + rng.choice(span, count, replace=False)).tolist())
        parts.append((chunk, ids))
    parts = parts if across else [parts[int(rng.integers(2))]]
    gather = list(range(num_frames))
    if rng.random() < 0.3:
        gather = rng.integers(0, num_frames, num_frames).tolist()
    return {"parts": parts, "gather": gather}


def random_requests(
    chunks: Chunks, *, count: int, views: int, num_frames: int, size: int, seed: int
) -> list[ClipRequest]:
    """Clips of all contents and codecs in turn; a third shows whole pictures, so that numbers can be read."""
    rng, requests = np.random.default_rng(seed), []
    for sample_id in range(count):
        pair = list(chunks.values())[sample_id % len(chunks)]
        borders = border_windows(pair[0].width, pair[0].height)
        picked = rng.choice(len(borders), views, replace=False)
        windows = [] if sample_id % 3 == 0 and views == 1 else [borders[i] for i in picked]
        flips = [bool(rng.random() < 0.5) for _ in windows]
        clip = frames_of(rng, pair, num_frames)
        requests.append(clip_request(sample_id, windows=windows, flips=flips, size=size, **clip))
    return requests


def numbers_wanted(request: ClipRequest) -> list[int]:
    """Frame numbers that a clip shows; both chunks of a pair are numbered through."""
    offsets = [FRAMES if f"_{FRAMES}." in part.chunk.path else 0 for part in request.parts]
    ids = [i + offset for part, offset in zip(request.parts, offsets, strict=True) for i in part.frame_ids]
    return [ids[i] for i in request.gather]


@pytest.mark.parametrize(
    "what",
    [
        {"count": 250, "views": 1, "num_frames": 4, "size": 112, "seed": 1},
        {"count": 90, "views": 3, "num_frames": 4, "size": 96, "seed": 2},
        {"count": 60, "views": 1, "num_frames": 16, "size": 112, "seed": 3},
        {"count": 50, "views": 1, "num_frames": 4, "size": 80, "seed": 4},
        {"count": 50, "views": 1, "num_frames": 2, "size": 224, "seed": 5},
    ],
    ids=["4 frames", "3 views", "16 frames", "shrunk", "enlarged"],
)
def test_both_loaders_deliver_the_same(chunks: Chunks, pool: WorkerPool, what: dict[str, int]) -> None:
    planner = FixedPlanner(random_requests(chunks, **what))
    with loader_of(planner, pool, decoder="cpu-fused") as loader:
        expected = epoch(loader)
    with loader_of(planner, pool) as loader:
        batches = epoch(loader)
        assert loader.stats.delivered == what["count"]
        assert loader.stats.decoded_on_cpu == loader.stats.failures.total() == 0
    assert sum(map(len, batches)) == what["count"]
    for batch, right in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch.sample_ids, right.sample_ids)
        np.testing.assert_array_equal(batch.view_ids, right.view_ids)
        assert batch.tokens_BL.tolist() == right.tokens_BL.tolist()
        assert batch.valid.all()
        assert batch.frames_BTHWC.shape == right.frames_BTHWC.shape
        for row in range(len(batch.view_ids)):
            request = planner.requests[batch.sample_ids[row // what["views"]]]
            got, wanted = batch.frames_BTHWC[row].numpy(), right.frames_BTHWC[row].numpy()
            assert_close(got, wanted, (request.parts, request.windows))
            if "soft" in request.parts[0].chunk.path and what["views"] == 1 and row % 3 == 0:
                assert_numbers(request, got)


def assert_numbers(request: ClipRequest, frames_THWC: np.ndarray) -> None:
    if request.windows[0].width == SIZE[0] and not request.flips[0]:
        shown = [make_videos.read_frame_number(frame) for frame in frames_THWC]
        assert shown == numbers_wanted(request)
