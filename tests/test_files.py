"""Files are whole or absent: while they are written, after errors, and across a rename."""

from __future__ import annotations

import errno
import os

import pytest

from avion_dali import files
from avion_dali.contracts import UserError
from avion_dali.files import (
    PARTIAL_PATTERN,
    atomic_write,
    atomic_write_text,
    partial_path,
    put_in_place,
    whole_or_absent,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_gets_its_name_at_the_end(tmp_path):
    path = tmp_path / "table.arrow"
    path.write_text("old")
    with whole_or_absent(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial in tmp_path.glob(PARTIAL_PATTERN)
    assert path.read_text() == "new" and names(tmp_path) == ["table.arrow"]


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_or_absent(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), whole_or_absent(path):
        pass  # nothing was written
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_content_and_name_are_flushed_in_this_order(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", noted_fsync)
    monkeypatch.setattr(files.os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    partial = tmp_path / "partial"
    partial.write_bytes(b"x")
    put_in_place(partial, tmp_path / "x")
    assert done == ["partial", "renamed", tmp_path.name] and names(tmp_path) == ["x"]


def test_an_open_reader_keeps_the_old_content(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with path.open() as reader:
        atomic_write_text(path, "néw")
        assert reader.read() == "old"
    assert path.read_text(encoding="utf-8") == "néw"


def test_errors_of_the_system_name_the_file_and_the_way_out(tmp_path):
    def full(file) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "new" / "a.pt"
    with pytest.raises(UserError, match=r"a\.pt could not be written: No space left.*no file was created"):
        atomic_write(path, full)
    path.write_text("old")
    with pytest.raises(
        UserError, match="the existing file is unchanged. Free disk space or choose another folder"
    ):
        atomic_write(path, full)
    assert path.read_text() == "old" and names(path.parent) == ["a.pt"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="could not be written"):
        atomic_write_text(tmp_path / "folder", "text")


def test_other_errors_are_passed_on(tmp_path):
    with pytest.raises(ValueError, match="mine"):
        atomic_write(tmp_path / "a", lambda file: (_ for _ in ()).throw(ValueError("mine")))
    with pytest.raises(RuntimeError, match="mine"):
        atomic_write(tmp_path / "a", lambda file: (_ for _ in ()).throw(RuntimeError("mine")))
    assert names(tmp_path) == []


def test_partial_names_are_hidden_and_fixed(tmp_path):
    assert partial_path(tmp_path / "0.mp4") == tmp_path / ".0.mp4.partial"
