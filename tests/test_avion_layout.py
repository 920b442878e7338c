"""Chunk folders that AVION made work as they are: any rate, chunks a frame short, holes that are told."""

from fractions import Fraction
from pathlib import Path

import make_videos
import numpy as np
import pytest
from annotation_files import epic_row, rejected_rows, settings, use_light_tokenizer, write_epic, write_pickle

from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.datasets.ego4d import build_ego4d_manifest
from avion_dali.datasets.ek100 import build_retrieval_manifest
from avion_dali.decode.cpu_fused import decode_clip

SECONDS = 15
# Frames of the first two chunks, as FFmpeg cuts them: at 29.97 and 59.94 frames a second a chunk is one short.
RATES = {
    "25fps": (Fraction(25), (375, 375)),
    "29.97fps": (Fraction(30_000, 1001), (450, 449)),
    "30fps": (Fraction(30), (450, 450)),
    "50fps": (Fraction(50), (750, 750)),
    "59.94fps": (Fraction(60_000, 1001), (900, 899)),
}
NUMBERS = 1 << make_videos.BITS
SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`videos_288px_15sec/<uid>.mp4/<second>.mp4`, square, so that a centre crop shows the frame's number."""
    root = tmp_path_factory.mktemp("layout") / "videos_288px_15sec"
    pictures = {n: make_videos.draw_frame(n, (SIDE, SIDE)) for n in range(NUMBERS)}
    for name, (fps, counts) in RATES.items():
        (root / f"{name}.mp4").mkdir(parents=True)
        for part, frames in enumerate(counts):
            make_videos.write_video(
                root / f"{name}.mp4" / f"{part * SECONDS}.mp4",
                frames=frames,
                fps=fps,
                size=(SIDE, SIDE),
                options={**make_videos.X264_FAST, "preset": "ultrafast"},
                first_number=sum(counts[:part]),
                draw=lambda number, _: pictures[number % NUMBERS],
            )
    (root / "30fps.mp4" / "45.mp4").write_bytes((root / "30fps.mp4" / "0.mp4").read_bytes())
    return root


@pytest.fixture(autouse=True)
def light_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    use_light_tokenizer(monkeypatch)


def expected_numbers(name: str, start_s: float, end_s: float, num_frames: int) -> np.ndarray:
    """Middles of equal parts of the frames shown in a span, by each chunk's own clock and frame count."""
    fps, counts = RATES[name]
    times = [part * SECONDS + i / float(fps) for part, count in enumerate(counts) for i in range(count)]
    inside = [n for n, time in enumerate(times) if start_s - 0.5 / fps <= time < end_s - 0.5 / fps]
    edges = np.linspace(0, len(inside), num_frames + 1)
    return np.array([inside[int(middle)] for middle in (edges[1:] + edges[:-1]) / 2])


SPANS = [
    (0.0, 1.0),
    (3.2, 4.9),
    (13.5, 16.5),
    (14.9, 15.1),
    (14.0, 15.0),
    (15.0, 16.0),
    (28.5, 29.9),
    (0.0, 29.0),
]


@pytest.mark.parametrize("name", RATES)
def test_clips_show_the_frames_of_their_seconds(tmp_path: Path, folder: Path, name: str) -> None:
    rows = [(name, start, end, "#C C looks") for start, end in SPANS]
    build_ego4d_manifest(settings(folder, tmp_path / "m"), [write_pickle(tmp_path / "x.pkl", rows)])
    manifest = Manifest(tmp_path / "m")
    planner = Planner(manifest, ClipRules(num_frames=4, frame_size=SIDE, training=False), seed=0)
    for row, (start_s, end_s) in enumerate(SPANS):
        request = planner.plan(row, 0)
        frames = np.empty(request.frames_shape, dtype=np.uint8)
        decode_clip(request, frames)
        shown = np.array([make_videos.read_frame_number(frame) for frame in frames[0]])
        expected = expected_numbers(name, start_s, end_s, 4)
        assert np.abs((shown - expected + NUMBERS // 2) % NUMBERS - NUMBERS // 2).max() <= 1, (start_s, shown)


@pytest.mark.parametrize("name", RATES)
def test_a_training_clip_never_asks_for_a_frame_that_is_not_there(
    tmp_path: Path, folder: Path, name: str
) -> None:
    """449-frame chunks, spans that end with the video or up to a second after it."""
    rows = [(name, 29.0 + i / 50, 29.9 + i / 50, "x") for i in range(40)]
    report = build_ego4d_manifest(
        settings(folder, tmp_path / "m", skip_bad_rows=True), [write_pickle(tmp_path / "x.pkl", rows)]
    )
    manifest = Manifest(tmp_path / "m")
    planner = Planner(manifest, ClipRules(num_frames=16, frame_size=SIDE, training=True), seed=0)
    counts = RATES[name][1]
    assert report.num_samples >= 6
    for row in range(report.num_samples):
        for epoch in range(5):
            for part in planner.plan(row, epoch).parts:
                assert part.frame_ids[-1] < counts[int(Path(part.chunk.path).stem) // SECONDS]


def test_a_hole_in_the_middle_is_told_and_spares_the_rest(tmp_path: Path, folder: Path) -> None:
    """Chunk 30 of `30fps` is missing, 45 is there."""
    rows = [
        ("30fps", 29.0, 30.0, "before"),
        ("30fps", 29.0, 31.0, "into"),
        ("30fps", 35.0, 36.0, "inside"),
        ("30fps", 44.9, 45.5, "out of"),
        ("30fps", 45.0, 46.0, "after"),
        ("30fps", 10.0, 50.0, "over"),
        ("25fps", 29.5, 33.0, "beyond the last"),
    ]
    pickle_file = write_pickle(tmp_path / "x.pkl", rows)
    report = build_ego4d_manifest(settings(folder, tmp_path / "m", skip_bad_rows=True), [pickle_file])
    assert report.rejected == {"missing chunk": 4, "past the end": 1}
    assert [s.texts[0] for s in Manifest(tmp_path / "m").samples()] == ["before", "after"]
    assert "the chunk of 30-45 s is missing" in rejected_rows(tmp_path / "m")[0]["reason"]


def test_folders_of_participants_with_capital_endings(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "EK100_320p_15sec_30fps_libx264"
    (root / "P01").mkdir(parents=True)
    (root / "P01" / "P01_01.MP4").mkdir()
    for second in (0, 15):
        source = folder / "59.94fps.mp4" / f"{second}.mp4"
        (root / "P01" / "P01_01.MP4" / f"{second}.MP4").write_bytes(source.read_bytes())
    csv = write_epic(tmp_path / "x.csv", [epic_row("a", "00:00:14.50", "00:00:15.50")])
    build_retrieval_manifest(settings(root, tmp_path / "m"), csv)
    manifest = Manifest(tmp_path / "m")
    request = Planner(manifest, ClipRules(num_frames=4, frame_size=SIDE, training=False), seed=0).plan(0, 0)
    assert [Path(part.chunk.path).name for part in request.parts] == ["0.MP4", "15.MP4"]
    expected = expected_numbers("59.94fps", 14.5, 15.5, 4)
    ids = [i + 900 * n for n, part in enumerate(request.parts) for i in part.frame_ids]
    assert np.abs(np.array(ids) - expected).max() <= 1
