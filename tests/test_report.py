"""The HTML report: complete, self-contained, safe against odd texts."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from avion_dali.report.html_report import ReportData, ReportMatch, ReportQuery, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects texts, tags and attributes, and insists that tags are closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def rows(count: int) -> list[dict]:
    train = [
        {
            "kind": "train",
            "step": step,
            "loss": 5.0 / step,
            "clips_per_s": 100.0 + step,
            "data_wait_share": 0.05,
            "gpu_idle_share": 0.0125,
            "step_s": 0.5,
            "memory_mb": 900.0 + step,
            "replaced": 2,
            "decoder": "cpu-fused",
        }
        for step in range(1, count + 1)
    ]
    evaluation = [
        {"kind": "evaluation", "step": step, "map_avg": 0.25, "ndcg_avg": None, "clips": 77, "unreadable": 1}
        for step in (2, count)
    ]
    config = {"decoder": "cpu-fused", "optim": {"learning_rate": 3e-5, "global_batch": 4096}}
    return [{"kind": "header", "step": 0, "best_metric": "map_avg", "config": config}, *train, *evaluation]


def thumbnails(value: int, frames: int = 2) -> np.ndarray:
    return np.full((frames, 24, 32, 3), value, dtype=np.uint8)


def make_data(**changes) -> ReportData:
    matches = (
        ReportMatch(thumbnails(200), 0.91, label="kitchen", is_right=True),
        ReportMatch(thumbnails(40), 0.5),
    )
    values = {
        "title": "A <run>",
        "rows": rows(5),
        "metrics": {"map_avg": 0.512345, "clips": 12000.0},
        "gallery": (ReportQuery('cut "the" <b>onion</b> & go', matches),),
        "command": "python -m train.pretrain --config a.yaml && echo <done>",
        "versions": {"torch": "2.15.0"},
    }
    return ReportData(**{**values, **changes})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "sub" / "report.html"
    write_report(path, make_data())
    return path.read_text()


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_texts_are_shown_as_written_and_never_become_markup(page):
    text = "\n".join(page.texts)
    assert 'cut "the" <b>onion</b> & go' in text and "A <run>" in text
    assert "python -m train.pretrain --config a.yaml && echo <done>" in text
    assert page.all("b") == [] and page.all("run") == []


def test_every_table_and_label_is_escaped(tmp_path):
    odd = "<i>&odd"
    match = ReportMatch(thumbnails(9), 0.5, label=odd)
    data = make_data(
        metrics={odd + "1": 1.0},
        versions={odd + "2": odd},
        resources={odd + "3": odd},
        unreadable={odd + "4": 2},
        unreadable_rows=[odd + "5"],
        gallery=(ReportQuery(odd, (match,)),),
        rows=[{"kind": "header", "step": 0, "config": {odd + "6": odd}}, *rows(2)[1:]],
    )
    write_report(tmp_path / "r.html", data)
    page = Page((tmp_path / "r.html").read_text())
    assert not page.all("i") and page.all("img")[0]["alt"] == odd
    assert {odd + str(number) for number in range(1, 7)} <= set(page.texts)


def test_nothing_is_loaded_from_outside(source, page):
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or ""
            assert target.startswith(("data:", "#")) or not target
    assert not page.all("script") and not page.all("link")
    assert "@import" not in source and not re.search(r"url\((?!#)", source)


def test_curves_take_the_pages_colour_and_have_distinct_ids(source, page):
    assert len(page.all("svg")) == 4
    assert "currentColor" in source and "#123457" not in source
    clips = re.findall(r'<clipPath id="([^"]+)"', source)
    assert len(clips) == len(set(clips))
    for title in ("Loss", "Evaluation", "Share of the step spent waiting for data"):
        assert title in page.texts
    assert "prefers-color-scheme: dark" in source


def test_a_loss_curve_goes_down_the_page(source):
    """Reads the drawn line back: y grows downwards in SVG, and the loss falls."""
    line = re.search(r'<g id="line2d_\d+">\s*<path d="([^"]+)" clip-path[^>]*stroke: #3b82f6', source)
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line[1])]
    assert len(points) == 5
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in zip(points, points[1:], strict=False))


def test_numbers_are_in_the_tables(page):
    cells = [text for text in page.texts if text.strip()]
    for name, value in (
        ("map_avg", "0.5123"),
        ("clips", "12,000"),
        ("optimizer steps", "5"),
        ("last loss", "1"),
        ("clips per second (median)", "103"),
        ("peak memory, MiB", "905"),
        ("replaced clips", "2"),
        ("torch", "2.15.0"),
    ):
        assert cells[cells.index(name) + 1] == value if cells.count(name) == 1 else value in cells, name


def test_the_best_step_is_told_and_counts_are_no_curves(page):
    """Of equal evaluations the first is the best: its checkpoint is kept."""
    assert any("2 evaluations, best map_avg 0.25 after step 2" in text for text in page.texts)
    assert "unreadable" not in page.texts and page.texts.count("clips") == 1  # in the table alone


def test_the_settings_are_shown_under_their_dotted_names(page):
    cells = [text for text in page.texts if text.strip()]
    for name, value in (
        ("optim.learning_rate", "3e-05"),
        ("optim.global_batch", "4096"),
        ("decoder", "cpu-fused"),
    ):
        assert cells[cells.index(name) + 1] == value


def test_thumbnails_are_the_frames_side_by_side(page):
    images = page.all("img")
    assert len(images) == 2
    for attributes, value in zip(images, (200, 40), strict=True):
        data = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"))
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert pixels.shape == (24, 64, 3) and abs(int(pixels.mean()) - value) <= 1
        assert (attributes["width"], attributes["height"]) == ("64", "24")
    figures = [a["class"] for a in page.all("figure") if "match" in a["class"]]
    assert figures == ["match right", "match"]
    assert "0.910 - right - kitchen" in page.texts and "0.500" in page.texts


def test_empty_run_is_still_a_page(tmp_path):
    write_report(tmp_path / "r.html", make_data(rows=[], metrics={}, gallery=(), versions={}))
    page = Page((tmp_path / "r.html").read_text())
    assert not page.all("svg") and "Loss: the log has no such row." in page.texts
    assert "Texts and the videos found for them" not in page.texts
    assert "None." in page.texts


def test_equal_data_gives_equal_files(tmp_path, source):
    write_report(tmp_path / "again.html", make_data())
    assert (tmp_path / "again.html").read_text() == source


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_thumbnails_are_checked(frames):
    with pytest.raises(ValueError, match=r"must be uint8 \(T, H, W, 3\)"):
        ReportMatch(frames, 0.0)
