"""Pickles are data here: what is plain comes out as it went in, and nothing in a file is ever run."""

import datetime
import gc
import os
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_files import write_pickle

from avion_dali.contracts import UserError
from avion_dali.datasets.unpickling import check_pickle, load_pickle

ROWS = [("uid-1", 0.5, 1.25, "#C C cuts"), ("uid-2", 3, 4.0, ["a", "naïve 😀"], [0.1, -2.5])]
PLAIN: list[Any] = [ROWS, {"a": [1, None, True], 2: b"\xff\x00"}, [{1, 2}, frozenset("x"), 10**30, b""]]
ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype="f4").reshape(2, 3)),
    np.arange(5000, dtype="i8"),
    np.arange(4, dtype=">i4"),
    np.array([True, False]),
    np.array(["ab", "ü"]),
    np.zeros((0, 3)),
    np.array(2.5),
]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def old_numpy(data: bytes) -> bytes:
    """What numpy 1 wrote: the same functions by another path."""
    assert b"numpy._core" in data
    return data.replace(b"numpy._core", b"numpy.core")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_come_back(tmp_path: Path, protocol: int) -> None:
    for value in PLAIN:
        assert load_pickle(write_pickle(tmp_path / "x.pkl", value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_arrays_come_back(tmp_path: Path, protocol: int, array: np.ndarray) -> None:
    data = pickle.dumps(array, protocol)
    # Opcodes of protocols below 4 name modules by line, so the other path may be of any length.
    for content in (data, old_numpy(data)) if protocol < 4 else (data,):
        (tmp_path / "x.pkl").write_bytes(content)
        read = load_pickle(tmp_path / "x.pkl")
        assert type(read) is np.ndarray
        assert (read.shape, read.dtype.kind, read.dtype.itemsize) == (
            array.shape,
            array.dtype.kind,
            array.dtype.itemsize,
        )
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_numbers_become_plain_ones(tmp_path: Path, protocol: int) -> None:
    row = ("uid", np.float64(0.5), np.int32(7), np.bool_(True))
    read = load_pickle(write_pickle(tmp_path / "x.pkl", row, protocol))
    assert read == ("uid", 0.5, 7, True)
    assert [type(value) for value in read[1:]] == [float, int, bool]


def test_what_python_2_wrote_is_read_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"(lp0\n(S'uid'\np1\nF0.5\nF1.0\nS'caf\\xc3\\xa9'\np2\ntp3\na.")
    assert load_pickle(tmp_path / "x.pkl") == [(b"uid", 0.5, 1.0, "café".encode())]


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def touch(path: str) -> None:
    Path(path).touch()


EVIL = [
    (lambda path: Calls(os.system, f"touch {path}"), "posix.system|nt.system"),
    (lambda path: Calls(eval, f"open({path!r}, 'w')"), "eval"),
    (lambda path: Calls(touch, path), "test_unpickling.touch"),
    (lambda path: [("uid", 1.0, 2.0, Calls(open, path, "w"))], "open"),
    (lambda path: datetime.date(2020, 1, 1), "datetime.date"),
    (lambda path: np.array([touch, path], object), "object"),
    (lambda path: np.zeros(2, [("a", "f8"), ("b", "O")]), "numpy array of void"),
    (lambda path: np.datetime64("2020"), "datetime64"),
    (lambda path: touch, "test_unpickling.touch"),
    (lambda path: Calls(getattr, np, "load"), "getattr"),
]


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(("make", "named"), EVIL, ids=[named for _, named in EVIL])
def test_anything_else_is_refused_by_name_and_not_run(
    tmp_path: Path, protocol: int, make: Callable[[str], Any], named: str
) -> None:
    made = tmp_path / "made"
    path = tmp_path / "x.pkl"
    try:
        write_pickle(path, make(str(made)), protocol)
    except TypeError:  # modules have no pickle; the call by name has
        path.write_bytes(b"cbuiltins\ngetattr\n(I1\nS'a'\ntR.")
    with pytest.raises(UserError) as caught:
        load_pickle(path)
    assert any(name in str(caught.value) for name in named.split("|"))
    assert "run code" in str(caught.value)
    assert not made.exists()


HEAD = b"\x80\x02"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8I00\nI01\n\x87R"
TRICKS = {
    "a state for a function": HEAD + b"cnumpy\ndtype\n}X\x01\x00\x00\x00aI1\nsb.",
    "attributes for a function": HEAD + b"cnumpy\ndtype\nN}X\x05\x00\x00\x00_callI1\ns\x86b.",
    "a class where a function is": HEAD + b"cnumpy\nndarray\n)\x81.",
    "a dotted name": HEAD + b"cnumpy\nndarray.tofile\n.",
    "another encoding": HEAD + b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",
    "memory by number": HEAD + b"c__builtin__\nbytearray\nI1000000000000\n\x85R.",
    "bytes by number": HEAD + b"c__builtin__\nbytes\nI1000000000000\n\x85R.",
    "more numbers than bytes": HEAD + b"cnumpy.core.multiarray\nscalar\n" + DTYPE + b"X\x01\x00\x00\x00a\x86R.",
    "a byte order that is none": HEAD + DTYPE + b"(I3\nX\x01\x00\x00\x00?tb.",
    "a negative shape": HEAD
    + b"cnumpy.core.numeric\n_frombuffer\n(X\x08\x00\x00\x00aaaaaaaa"
    + DTYPE
    + b"I-1\nI-1\n\x86X\x01\x00\x00\x00CtR.",
    "a persistent id": HEAD + b"Pid\n.",
    "an extension": HEAD + b"\x82\x01.",
    "nothing on the stack": HEAD + b".",
}


@pytest.mark.parametrize("name", TRICKS)
def test_misuse_of_what_is_admitted_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.pkl").write_bytes(TRICKS[name])
    with pytest.raises(UserError):
        load_pickle(tmp_path / "x.pkl")
    # What is admitted still works: nothing that a file can do lasts.
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(np.arange(3), 2))
    assert load_pickle(tmp_path / "y.pkl").tolist() == [0, 1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux")
def test_a_table_of_billions_of_entries_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(HEAD + b"]r\xff\xff\xff\x7f.")
    with pytest.raises(UserError, match="more memory than is available"):
        load_pickle(tmp_path / "x.pkl")
    size = 300_000_000
    assert memoryview(bytearray(size)).nbytes == size  # the bound ends with the reading


def test_a_file_cut_anywhere_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    for value, protocol in ((ROWS[:1], 0), (ROWS, 4), (ARRAYS[7], 2), (ARRAYS[7], 5)):
        data = pickle.dumps(value, protocol)
        for size in range(len(data)):
            path.write_bytes(data[:size])
            with pytest.raises(UserError, match="download it again"):
                load_pickle(path)


def test_damage_is_a_user_error_or_another_value(tmp_path: Path) -> None:
    """500 files with changed bytes: no other exception, and the process lives."""
    rng = random.Random(0)
    path = tmp_path / "x.pkl"
    sources = [pickle.dumps(value, protocol) for value in (ROWS, *ARRAYS[:2]) for protocol in (0, 2, 4, 5)]
    errors = 0
    for _ in range(500):
        data = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            load_pickle(path)
        except UserError:
            errors += 1
    assert 50 < errors < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "not a complete pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a complete pickle"),
        (b"PK\x03\x04 a zip.", "not a complete pickle"),
    ],
)
def test_other_files_are_told_at_once(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    for read in (check_pickle, load_pickle):
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pkl", tmp_path):
        with pytest.raises(UserError, match="cannot be read") as caught:
            load_pickle(path)
        assert str(path) in str(caught.value)


def test_garbage_collection_is_on_again_afterwards(tmp_path: Path) -> None:
    write_pickle(tmp_path / "x.pkl", ROWS)
    (tmp_path / "y.pkl").write_bytes(b"\x80\x04garbage.")
    load_pickle(tmp_path / "x.pkl")
    assert gc.isenabled()
    with pytest.raises(UserError):
        load_pickle(tmp_path / "y.pkl")
    assert gc.isenabled()
