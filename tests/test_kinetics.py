"""Lists of videos: every published style is read, and each line finds its file or says why not."""

import shutil
from pathlib import Path
from typing import Any

import make_videos
import pytest
from annotation_files import rejected_rows, settings, write_lines
from chunk_folders import copy_chunks

from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.data.planner import ClipRules, Planner
from avion_dali.datasets.building import BuildReport, RejectedRow
from avion_dali.datasets.kinetics import ListedVideo, build_kinetics_manifest, read_class_names, read_list


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, chunk_file: Path) -> Path:
    """Whole videos as they lie in a folder of Kinetics, and some that cannot be used."""
    root = tmp_path_factory.mktemp("k400_320p")
    names = ["abseiling/id_000001_000011.mp4", "riding a bike/v 1.2.mp4", "flat.mkv", "twice.mp4.mp4", "7.mp4"]
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(chunk_file, root / name)
    (root / "broken.mp4").write_bytes(b"no video")
    make_videos.write_video(root / "turned.mp4", frames=5, size=(64, 48), rotation=90)
    return root


def build(root: Path, listing: Path, **options: Any) -> BuildReport:
    names = options.pop("class_names", None)
    whole = options.pop("whole_files", True)
    build_settings = settings(root, listing.parent / "m", **options)
    return build_kinetics_manifest(build_settings, listing, whole_files=whole, class_names=names)


def test_whole_files_become_chunks_of_their_own(tmp_path: Path, videos: Path) -> None:
    lines = ["abseiling/id_000001_000011 300 0", "riding a bike/v 1.2 30 2", "flat 30 1", "7.mp4 30 2"]
    report = build(videos, write_lines(tmp_path / "train.txt", *lines))
    assert (report.num_samples, report.num_chunks, report.num_texts, report.rejected) == (4, 4, 0, {})
    manifest = Manifest(tmp_path / "m")
    samples = list(manifest.samples())
    names = ["abseiling/id_000001_000011.mp4", "riding a bike/v 1.2.mp4", "flat.mkv", "7.mp4"]
    chunks = [manifest.chunk(s.first_chunk) for s in samples]
    assert [chunk.video for chunk in chunks] == names
    assert [chunk.ref.path for chunk in chunks] == [str(videos / name) for name in names]
    assert [s.label for s in samples] == [0, 2, 1, 2]
    assert {(s.num_chunks, s.start_s, s.end_s, s.texts) for s in samples} == {(1, 0.0, 1.0, ())}
    assert manifest.classes is not None
    assert manifest.classes.names == ("0", "1", "2")
    assert chunks[0].ref.num_frames == 30  # probed, whatever the list says
    planner = Planner(manifest, ClipRules(num_frames=4, frame_size=32, training=False), seed=0)
    assert planner.plan(1, 0).parts[0].frame_ids == (3, 11, 18, 26)


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a/b 300 5", "a/b", 5),
        ("a/b 5", "a/b", 5),
        ("a/b.mp4 0 -1", "a/b.mp4", -1),
        ("/data/k400/a b/c d.mp4 12 3", "/data/k400/a b/c d.mp4", 3),
        ("a b/c.mp4 3", "a b/c.mp4", 3),
        ("a b/c.mp4,3", "a b/c.mp4", 3),
        ("a, b/c.mp4, 10, 3", "a, b/c.mp4", 3),
        ("a b/c.mp4\t10\t3", "a b/c.mp4", 3),
        ("  a/b   300\t 5 ", "a/b   300", 5),  # a tab parts fields where there is one
        ("\ufeffa/b 1 5", "a/b", 5),
    ],
)
def test_styles_of_lines(tmp_path: Path, line: str, path: str, label: int) -> None:
    (row,) = read_list(write_lines(tmp_path / "x.txt", line))
    assert row == ListedVideo(1, path, label)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a/b", "is neither"),
        ("a/b abseiling", "is neither"),
        ("300 -1x", "is neither"),
        ("5", "is neither"),
        ("a/b 300 -2", "label -2 is below -1"),
        ("label,youtube_id,time_start,time_end,split", "is neither"),
        ("a/b 300 99999999999999999999", "is neither"),
    ],
)
def test_other_lines_are_rejected(tmp_path: Path, line: str, reason: str) -> None:
    good, bad = read_list(write_lines(tmp_path / "x.txt", "a/good 1 2", "", line))
    assert isinstance(good, ListedVideo)
    assert isinstance(bad, RejectedRow)
    assert (bad.line, reason in bad.reason) == (3, True)


def test_a_path_listed_twice_is_rejected(tmp_path: Path) -> None:
    rows = list(read_list(write_lines(tmp_path / "x.txt", "a 1 2", "b 1 2", "a 1 3")))
    assert isinstance(rows[2], RejectedRow)
    assert (rows[2].kind, rows[2].reason) == ("duplicate", "already occurs in line 1")


def test_unlabelled_lists_make_unlabelled_clips(tmp_path: Path, videos: Path) -> None:
    lines = [f"{videos}/abseiling/id_000001_000011.mp4 0 -1", f"{videos}/flat.mkv 0 -1"]
    build(videos, write_lines(tmp_path / "pretrain.txt", *lines))
    manifest = Manifest(tmp_path / "m")
    assert [s.label for s in manifest.samples()] == [-1, -1]
    assert manifest.classes is None
    assert manifest.chunk(0).video == "abseiling/id_000001_000011.mp4"


def test_absolute_paths_outside_the_folder(tmp_path: Path, videos: Path, chunk_file: Path) -> None:
    (tmp_path / "root").mkdir()
    listing = write_lines(tmp_path / "x.csv", f"{chunk_file},0", f"{videos}/7.mp4,1")
    build(tmp_path / "root", listing)
    manifest = Manifest(tmp_path / "m")
    paths = [Path(manifest.chunk(s.first_chunk).ref.path).resolve() for s in manifest.samples()]
    assert paths == [chunk_file.resolve(), (videos / "7.mp4").resolve()]


def test_the_folder_may_be_a_link(tmp_path: Path, videos: Path) -> None:
    (tmp_path / "link").symlink_to(videos)
    build(tmp_path / "link", write_lines(tmp_path / "x.txt", "flat 30 0"))
    assert Manifest(tmp_path / "m").chunk(0).video == "flat.mkv"


def test_an_ending_is_neither_needed_nor_added_twice(tmp_path: Path, videos: Path) -> None:
    """A list with endings and one without find the same file; a file that was renamed to fit is found too."""
    for name, found in (
        ("7", "7.mp4"),
        ("7.mp4", "7.mp4"),
        ("twice.mp4", "twice.mp4.mp4"),
        ("flat", "flat.mkv"),
    ):
        build(videos, write_lines(tmp_path / "x.txt", f"{name} 30 0"))
        assert Manifest(tmp_path / "m").chunk(0).video == found


BAD = [
    ("attic/none.mp4 30 0", "is not a file in", "missing file"),
    ("abseiling 30 0", "is a folder, not a file", "missing file"),
    ("broken 30 0", "corrupt", "unusable file"),
    ("turned 30 0", "rotated by 90 degrees", "unusable file"),
    ("../../../etc/\x00 30 0", "is not a file in", "missing file"),
    ("x" * 5000 + " 30 0", "is not a file in", "missing file"),
]


@pytest.mark.parametrize(("line", "reason", "kind"), BAD, ids=[reason for _, reason, _ in BAD[:5]] + ["long"])
def test_bad_lines_are_told(tmp_path: Path, videos: Path, line: str, reason: str, kind: str) -> None:
    listing = write_lines(tmp_path / "x.txt", "7 30 0", line)
    with pytest.raises(UserError, match="1 of 2 rows") as caught:
        build(videos, listing)
    for words in (str(listing), "line 2", reason, "--skip-bad-rows"):
        assert words in str(caught.value)
    report = build(videos, listing, skip_bad_rows=True)
    assert (report.num_samples, report.rejected) == (1, {kind: 1})
    assert rejected_rows(tmp_path / "m")[0]["line"] == 2


def test_class_names_bound_the_labels(tmp_path: Path, videos: Path) -> None:
    names = write_lines(tmp_path / "names.txt", "abseiling", "riding a bike", "")
    listing = write_lines(tmp_path / "x.txt", "7 30 1", "flat 30 2")
    with pytest.raises(UserError, match="label 2, but there are 2 class names"):
        build(videos, listing, class_names=names)
    build(videos, listing, class_names=names, skip_bad_rows=True)
    classes = Manifest(tmp_path / "m").classes
    assert classes is not None
    assert classes.names == ("abseiling", "riding a bike")


@pytest.mark.parametrize(
    ("lines", "message"),
    [((), "has no class name"), (("a", "", "b"), "line 2: has no"), (("a", "b", "a"), "line 3: 'a' repeats")],
)
def test_bad_class_names_are_refused(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_class_names(write_lines(tmp_path / "names.txt", *lines))


def test_lists_that_cannot_be_read_are_named(tmp_path: Path, videos: Path) -> None:
    path = tmp_path / "x.txt"
    with pytest.raises(UserError, match=r"x\.txt cannot be read"):
        build(videos, path)
    for content, message in (
        (b"", "has no line"),
        (b"\n \n", "has no line"),
        (b"\xff\xfe\x00", "cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            build(videos, path)
    write_lines(path, "7 30 0")
    with pytest.raises(UserError, match="nowhere is not a folder; --videos"):
        build(tmp_path / "nowhere", path)


def test_videos_of_a_chunk_folder(tmp_path: Path, chunk_file: Path) -> None:
    root = copy_chunks(chunk_file, tmp_path / "chunks", {"abseiling/a.mp4": [0, 1, 2], "b.mp4": [0, 2]})
    listing = write_lines(tmp_path / "x.txt", "abseiling/a 90 0", "b.mp4 90 1", "c 90 1")
    report = build(root, listing, whole_files=False, skip_bad_rows=True)
    assert report.rejected == {"missing chunk": 1, "unknown video": 1}
    (sample,) = Manifest(tmp_path / "m").samples()
    assert (sample.num_chunks, sample.start_s, sample.end_s, sample.label) == (3, 0.0, 3.0, 0)
