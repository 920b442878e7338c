"""How names and errors are put into messages."""

from __future__ import annotations

import pytest

from avion_dali.wording import few, few_lines, first_line


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (9, "0, 1, 2 and 6 more")]
)
def test_few_names(count, text):
    assert few(range(count), 3) == text
    assert few({str(i): None for i in range(count)}, 3) == text


def test_few_lines():
    assert few_lines(["a", "b"], 2) == ["  a", "  b"]
    assert few_lines(["a", "b", "c", "d"], 2) == ["  a", "  b", "  and 2 more"]
    assert few_lines([]) == []


def test_first_line_of_an_error():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == ""
    assert first_line(ValueError("x" * 500)) == "x" * 160
