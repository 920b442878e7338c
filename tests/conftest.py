"""Session fixtures: media made once."""

from pathlib import Path

import make_videos
import pytest


@pytest.fixture(scope="session")
def gop_videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One 90-frame video for every GOP style, see `make_videos.gop_style_videos`."""
    return make_videos.gop_style_videos(tmp_path_factory.mktemp("gop_styles"))
