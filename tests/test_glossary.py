"""The glossary's table, and words that must not return to the library and its documentation."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")

# Phrases that no plain sentence of this project needs. Folders that still contain some are not listed yet.
RETIRED = (
    r"come what may",
    r"\bsuch as they are\b",
    r"\bfor us\b",
    r"\btaken anew\b",
    r"\bhas its say\b",
    r"\bwhat binds\b",
    r"\bat hand\b",
    r"\bmend(s|ed|ing)?\b",
    r"\bshall\b",
    r"\bclips? a second\b",
    r"\b(id|label|view|window|text|mask)s? a clip\b",
    r"\b[Cc]olour",
    r"\b[Nn]ormalis",
    r"\b[Bb]ehaviour",
    r"\bgraded relevancy\b",
)
FOLDERS = (
    *(f"avion_dali/{name}" for name in ("models", "metrics", "device_ops", "objectives", "config", "tasks")),
    *(f"avion_dali/{name}" for name in ("inference", "assembly", "report", "engine")),
    *(f"avion_dali/{name}" for name in ("inspection", "loading", "cli")),
    *("pipelines", "benchmarks", "train", "configs", "docs"),
)


def documents() -> list[Path]:
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".yaml")]
    return sorted([*files, ROOT / "CONTRIBUTING.md", *(ROOT / "avion_dali").glob("*.py")])


def retired_words(text: str) -> list[str]:
    found = re.finditer("|".join(RETIRED), re.sub(r"\s+#?\s*", " ", text))
    return [match[0] for match in found]


@pytest.mark.parametrize(
    "text", ["mend\n    # it", "an id a clip", "what\n binds", "the colours", "100 clips a second"]
)
def test_retired_words_are_found(text):
    assert retired_words(text)


@pytest.mark.parametrize("text", ["recommend", "marshall", "one id per clip", "a clip a model sees", "color"])
def test_other_words_are_allowed(text):
    assert not retired_words(text)


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_retired_words_do_not_return(path):
    assert retired_words(path.read_text(encoding="utf-8")) == []


def test_every_term_has_a_meaning_and_names_that_exist():
    rows = [line.strip("|").split(" | ") for line in GLOSSARY.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0].strip() != "term"]
    assert len(rows) > 50
    terms = [row[0].strip() for row in rows]
    assert len(set(terms)) == len(terms)
    library = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("avion_dali", "pipelines")
        for path in (ROOT / folder).rglob("*.py")
    )
    for term, meaning, places, *_ in rows:
        assert len(meaning.split()) > 2, term
        for name in re.findall(r"`([^`]+)`", places):
            is_path = "/" in name
            exists = (ROOT / name).exists() if is_path else name.rpartition(".")[2] in library
            assert exists, f"{term}: {name}"
