"""Annotation files are opened alike: what cannot be read is named once, with the way out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from avion_dali.contracts import UserError
from avion_dali.datasets.annotation_text import opened_text
from avion_dali.datasets.captions import read_rows
from avion_dali.datasets.epic_files import read_annotations
from avion_dali.datasets.kinetics import read_list

READERS: list[Callable[[Path], object]] = [
    lambda path: list(read_rows(path)),
    read_annotations,
    lambda path: list(read_list(path)),
]


@pytest.mark.parametrize("reader", READERS, ids=["captions", "epic", "list"])
def test_a_missing_file_is_named_once(tmp_path: Path, reader: Callable[[Path], object]) -> None:
    path = tmp_path / "absent.csv"
    with pytest.raises(UserError) as caught:
        reader(path)
    assert str(caught.value) == f"{path} cannot be read: No such file or directory"


@pytest.mark.parametrize("reader", READERS, ids=["captions", "epic", "list"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_says_what_to_save_it_as(
    tmp_path: Path, reader: Callable[[Path], object], encoding: str
) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("video,start,end,text\ncafé,0,1,x\n".encode(encoding))
    with pytest.raises(
        UserError, match=r"x\.csv cannot be read: byte 0x(e9|ff) is not UTF-8; save it as UTF-8"
    ):
        reader(path)


def test_marks_are_dropped_and_line_ends_kept(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffé\r\n".encode())
    with opened_text(tmp_path / "x.txt") as file:
        assert file.read() == "é\r\n"
