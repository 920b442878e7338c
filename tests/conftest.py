"""Session fixtures: media made once."""

import os
from pathlib import Path

# Tiny models gain nothing from several threads, and threads that wait for a busy core lose a lot. torch reads
# this when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import chunk_folders
import make_videos
import pytest

from benchmarks import media


@pytest.fixture(scope="session")
def gop_videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One 90-frame video for every GOP style, see `make_videos.gop_style_videos`."""
    return make_videos.gop_style_videos(tmp_path_factory.mktemp("gop_styles"))


@pytest.fixture(scope="session")
def chunk_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One second of video to lay out chunk folders from, see `chunk_folders.copy_chunks`."""
    return chunk_folders.make_chunk_file(tmp_path_factory.mktemp("chunk"))


@pytest.fixture(scope="session")
def moving_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds of a textured scene under a moving camera, with occlusion and sensor noise."""
    path = tmp_path_factory.mktemp("moving") / "head_mounted.mp4"
    return media.write_video(path, media.SCENES["head_mounted_0"], frames=300, size=(256, 144))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `lifelike_video`: the moving video, and real ones where AVION_EXTRA_VIDEOS names a folder."""
    if "lifelike_video" in metafunc.fixturenames:
        extra, _ = media.extra_videos()
        names = ["moving", *(path.stem for path in extra)]
        metafunc.parametrize("lifelike_video", [None, *extra], ids=names, indirect=True)


@pytest.fixture
def lifelike_video(request: pytest.FixtureRequest) -> Path:
    """A video like those that people film."""
    return request.param or request.getfixturevalue("moving_video")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` skip without a CUDA device, and fail on the machine that is meant to run them."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("AVION_REQUIRE_CUDA") == "1":
        pytest.fail("AVION_REQUIRE_CUDA=1, but torch finds no CUDA device")
    pytest.skip("needs a CUDA device")
