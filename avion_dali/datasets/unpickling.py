"""Reads pickled annotations as data: only built-in values and numpy arrays, without running code from the file.

A pickle is a program that may call any function it names (Python library reference, module `pickle`). This
reader admits no real functions: names of numpy's reconstruction functions are mapped to stand-ins that check
their arguments, and all other names are rejected. numpy's `__setstate__` of dtypes and arrays, which does not
validate its input, never receives an unchecked state from the file.
"""

from __future__ import annotations

import gc
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from avion_dali.contracts import UserError
from avion_dali.time_limit import bounded_time
from avion_dali.wording import shown

# Errors that a damaged file causes in the unpickler or a stand-in.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
)
_PLAIN_KINDS = frozenset("biufSU")
_HINT = "it may be truncated, or something else (a web page, a git-lfs pointer); download it again"
_PROTOCOL_2, _STOP = b"\x80", b"."
_OLD_PROTOCOLS = b"(]}lcdt"  # first opcodes of lists, tuples, dicts and arrays in protocols without a header


# Limit of additional address space: no pickle of annotations needs more (empty lists: about 50 times its size).
_MEMORY_BASE, _MEMORY_PER_BYTE = 1 << 28, 128


class _Refused(pickle.UnpicklingError):
    """The file requests something that is not data."""


def check_pickle(path: Path) -> None:
    """Reject a file that cannot be a complete pickle, by its first and last byte.

    Args:
        path: the file.

    Raises:
        UserError: when the file is missing, empty, not a pickle or truncated.
    """
    with _opened(path) as file:
        first = file.read(1)
        if not first:
            raise UserError(f"{path} is empty; download it again")
        file.seek(-1, 2)
        if (first != _PROTOCOL_2 and first not in _OLD_PROTOCOLS) or file.read(1) != _STOP:
            raise UserError(f"{path} is not a complete pickle: {_HINT}")


def load_pickle(path: Path) -> Any:
    """Read a pickle of plain values and numpy arrays.

    Args:
        path: the file, of any protocol, including those of Python 2 (whose byte strings remain bytes).

    Returns:
        Lists, tuples, dicts, sets, strings, bytes, numbers, booleans or None; numpy scalars become Python
        numbers; numpy arrays of numbers or text remain arrays.

    Raises:
        UserError: when the file is missing or damaged, or requests anything else, which the message names.
    """
    check_pickle(path)
    with _opened(path) as file, bounded_time(path), _without_collection(), _bounded_memory(path):
        try:
            value = _DataUnpickler(file, encoding="bytes").load()
        except _Refused as error:
            raise UserError(
                f"{path} contains {error}, which is not plain data; only lists, tuples, dicts, texts, numbers "
                "and numpy arrays of these are read, because a pickle can run code. Convert it at its origin"
            ) from None
        except MemoryError:
            reason = "needs more memory than is available: it is damaged, or too large for this machine"
            raise UserError(f"{path} {reason}") from None
        except _DAMAGE as error:
            raise UserError(f"{path} is not a readable pickle ({error}): {_HINT}") from error
    return value.view(np.ndarray) if isinstance(value, np.ndarray) else value


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


@contextmanager
def _without_collection() -> Iterator[None]:
    """Pause cyclic garbage collection, which would scan millions of new tuples repeatedly."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _bounded_memory(path: Path) -> Iterator[None]:
    """Let excessive allocations fail, on Linux: a changed byte may request a table of 2^32 entries."""
    if sys.platform != "linux":
        yield
        return
    import resource

    page = os.sysconf("SC_PAGE_SIZE")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * page
    room = min(_MEMORY_BASE + _MEMORY_PER_BYTE * path.stat().st_size, os.sysconf("SC_PHYS_PAGES") * page)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (used + room, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _StandIn:
    """A callable for use in pickles that permits nothing but the call."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function received a state")


class _Dtype:
    """A numpy dtype of plain numbers or text, stored as its code and byte order."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: str) -> None:
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Read the byte order, the second element of the state; the others repeat the code."""
        order = _as_text(state[1])
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"{order!r} is not a byte order")
        self._order = order

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype."""
        return np.dtype(self._order + self._code)


class _Array(np.ndarray):
    """An array that is filled by its state, as in numpy's pickles."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Read (version, shape, dtype, column-major, bytes)."""
        shape, dtype, by_columns, data = state[-4:]
        raw, real, sizes = _checked(data, dtype, shape=shape)
        checked: Any = (1, sizes, real, bool(by_columns), raw)  # numpy's stub declares another type
        super().__setstate__(checked)


def _new_array(*_: object) -> np.ndarray:
    return np.zeros(0, np.uint8).view(_Array)


def _new_dtype(code: Any, *_: object) -> _Dtype:
    name = _as_text(code)
    try:
        plain = np.dtype(name)
    except TypeError:
        raise _Refused(f"a numpy array of {name}") from None
    if plain.kind not in _PLAIN_KINDS:
        raise _Refused(f"a numpy array of {plain.name}")
    return _Dtype(name)


def _checked(data: Any, dtype: Any, *, shape: Any) -> tuple[Any, np.dtype[Any], tuple[int, ...]]:
    """Return the bytes, dtype and shape of an array, after checking that they match."""
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("an array without a dtype")
    raw = data.encode("latin1") if isinstance(data, str) else data
    sizes = tuple(int(size) for size in shape)
    if min(sizes, default=0) < 0 or memoryview(raw).nbytes != math.prod(sizes) * dtype.dtype.itemsize:
        raise pickle.UnpicklingError(f"an array of shape {sizes} does not fit its bytes")
    return raw, dtype.dtype, sizes


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    """Return a read-only array over bytes."""
    raw, real, sizes = _checked(data, dtype, shape=shape)
    return np.ndarray(sizes, real, raw, order="F" if _as_text(order) == "F" else "C")


def _scalar(dtype: Any, data: Any) -> Any:
    """Convert a numpy scalar to a Python value."""
    return _frombuffer(data, dtype, ())[()].item()


def _bytes_of(text: Any, encoding: Any) -> bytes:
    """Return bytes that an old protocol stored as text."""
    if _as_text(encoding) not in ("latin1", "latin-1"):
        raise _Refused(f"text to be encoded as {shown(encoding)}")
    return _as_text(text).encode("latin1")


def _as_text(value: Any) -> str:
    return (
        value.decode("latin1")
        if isinstance(value, bytes)
        else value
        if isinstance(value, str)
        else shown(value)
    )


def _allowed() -> dict[tuple[str, str], _StandIn]:
    """Return the stand-ins of the admitted names; numpy 2 moved its modules from `core` to `_core`."""
    found = {
        ("numpy", "ndarray"): _StandIn(_new_array),
        ("numpy", "dtype"): _StandIn(_new_dtype),
        ("_codecs", "encode"): _StandIn(_bytes_of),
    }
    for core in ("numpy.core", "numpy._core"):
        found[f"{core}.multiarray", "_reconstruct"] = _StandIn(_new_array)
        found[f"{core}.multiarray", "scalar"] = _StandIn(_scalar)
        found[f"{core}.numeric", "_frombuffer"] = _StandIn(_frombuffer)
    # Containers without opcodes in older protocols.
    for module in ("builtins", "__builtin__"):
        found[module, "set"] = _StandIn(set)
        found[module, "frozenset"] = _StandIn(frozenset)
        found[module, "bytearray"] = _StandIn(_byte_array)
        found[module, "bytes"] = _StandIn(_empty_bytes)
    return found


def _byte_array(data: Any = b"", encoding: Any = "latin1") -> bytearray:
    """Return a bytearray of given bytes; a number, which would allocate that many bytes, is an error."""
    return bytearray(_bytes_of(data, encoding) if isinstance(data, str) else memoryview(data))


def _empty_bytes() -> bytes:
    """Return the result of the call that old protocols use for empty bytes."""
    return b""


class _DataUnpickler(pickle.Unpickler):
    """Resolves only admitted names."""

    _found = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._found[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None
