"""How names and errors are put into messages."""

from __future__ import annotations

import logging
import os

import pytest

from avion_dali.cli import arguments
from avion_dali.cli.arguments import run_command
from avion_dali.contracts import UserError
from avion_dali.wording import few, few_lines, first_line, printable


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


def test_what_acts_on_a_terminal_is_escaped():
    assert printable("a\tb\nc é 日本") == "a\tb\nc é 日本"
    assert printable("\x1b[2J\x00\r\x9b\u202ex\udcff") == r"\x1b[2J\x00\r\x9b\u202ex\udcff"


def test_errors_and_messages_of_commands_are_escaped(capsys):
    def fail():
        logging.getLogger("avion_dali.test").warning("caption %s", "\x1b]0;title\x07")
        raise UserError("row \x1b[31m\udcff")

    with pytest.raises(SystemExit):
        run_command(fail)
    said = capsys.readouterr().err
    assert r"caption \x1b]0;title\x07" in said and r"error: row \x1b[31m\udcff" in said


def test_commands_let_gpu_memory_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_show_messages", lambda: None)
    for own in ({}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}):
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        found: dict[str, str] = {}
        with pytest.raises(SystemExit):
            run_command(lambda found=found: found.update(os.environ))
        expected = own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        assert {name: value for name, value in found.items() if name.endswith("_ALLOC_CONF")} == expected
