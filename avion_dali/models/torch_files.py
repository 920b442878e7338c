"""Reads files of `torch.save` without running the code that their pickles refer to.

Besides tensors, published checkpoints contain objects of the program that wrote them: an argparse.Namespace, a
pandas DataFrame, numpy scalars, a configuration class. Ordinary unpickling imports modules and calls any
function that the file names. Here nothing outside this module is imported or called: tensors and containers are
rebuilt, a Namespace becomes a dict, other objects become empty placeholders, and a file that requests any other
call is rejected with the name of that function.
"""

from __future__ import annotations

import mmap
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from avion_dali.contracts import UserError
from avion_dali.time_limit import bounded_time
from avion_dali.wording import first_line, shown

UNREADABLE: Final = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, struct.error),
    *(pickle.UnpicklingError, zipfile.BadZipFile, MemoryError, OverflowError, AssertionError, zlib.error),
)
"""Exceptions that reading a damaged, foreign or malicious file may raise."""

_STORAGE_DTYPES: Final[dict[str, torch.dtype]] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_MAX_UNPACKED: Final = 8  # times the size of the file; torch does not compress
_MAX_MODULES: Final = 100_000
_ZIP_LOCAL_HEADER: Final = 30  # bytes before the file name in a zip's local header

# Calls that only create data. Their result is a placeholder, and files that request them are accepted.
_DATA_CALL: Final = re.compile(
    r"""(builtins|__builtin__)\.(set|frozenset|slice|complex|bytearray|list|dict|tuple|int|float|object)
    | _codecs\.encode | (copyreg|copy_reg)\._reconstructor | torch\.(device|Size)
    | torch\.jit\._pickle\.build_\w+list | collections\.(defaultdict|Counter|deque)
    | datetime\.\w+ | pathlib(\._local)?\.\w*Path
    | (numpy|pandas)\.(\w+\.)*(_\w+|[A-Z]\w*|dtype|ndarray|scalar)""",
    re.VERBOSE,
)


class _InertType(type):
    """The type of placeholder classes; calls are rejected unless they only create data."""

    origin: str

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        if not _DATA_CALL.fullmatch(cls.origin):
            raise pickle.UnpicklingError(f"it requests a call of {cls.origin}, which is not allowed")
        placeholder: Any = cls
        return placeholder.__new__(placeholder)


class Inert(metaclass=_InertType):
    """Placeholder for an object of a class that is not imported; `state` is the object's pickled state."""

    origin = "object"
    state: Any = None

    def __new__(cls, *_args: object, **_kwargs: object) -> Inert:
        """Create an empty placeholder and ignore all arguments."""
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Accept an entry of a dict-like object and discard it."""

    def append(self, value: object) -> None:
        """Accept an item of a list-like object and discard it."""

    def extend(self, values: object) -> None:
        """Accept items of a list-like object and discard them."""

    add = append


class _Namespace(dict[str, Any]):
    """An argparse.Namespace as a dict."""

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.update(state)


class _Storage:
    """A one-dimensional storage of one dtype, of which tensors are views."""

    def __init__(self, dtype: torch.dtype, content_bytes: Tensor) -> None:
        self.dtype = dtype
        self.content_bytes = content_bytes

    def tensor(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        return self.content_bytes.view(self.dtype).as_strided(size, stride, offset)


def _rebuild_tensor(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: object
) -> Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return storage.tensor(offset, size, stride)  # torch rejects views that exceed the storage


def _rebuild_parameter(data: Tensor, *_rest: object) -> Tensor:
    return data


_REAL: Final[dict[str, object]] = {
    "collections.OrderedDict": OrderedDict,
    "argparse.Namespace": _Namespace,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}

StorageReader = Callable[[str, torch.dtype, int], _Storage]


class _InertUnpickler(pickle.Unpickler):
    """Rebuilds tensors and containers; all other names become placeholders, and nothing is imported."""

    def __init__(self, file: BinaryIO, read_storage: StorageReader) -> None:
        super().__init__(file, encoding="utf-8")
        self._read_storage = read_storage

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a class or function that the pickle names.

        Args:
            module: name of the module.
            name: name of the class or function.
        """
        origin = f"{module}.{name}"
        if origin in _REAL:
            return _REAL[origin]
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        return _InertType("Inert", (Inert,), {"origin": origin})

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage of the file.

        Args:
            pid: `("storage", dtype, key, device, number of elements)`, for old files with one more entry.

        Raises:
            pickle.UnpicklingError: when the reference is of another kind.
        """
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or len(pid) > 5 and pid[5]:
            raise pickle.UnpicklingError(f"an outside reference of an unknown kind: {shown(pid)}")
        if (
            not isinstance(pid[2], str | int)
            or not isinstance(pid[1], torch.dtype)
            or not isinstance(pid[4], int)
            or pid[4] < 0
        ):
            raise pickle.UnpicklingError(f"a storage of an unknown kind: {shown(pid)}")
        return self._read_storage(str(pid[2]), pid[1], pid[4])


def read_torch_file(path: Path) -> Any:
    """Read a file of `torch.save`, or the parameters of a TorchScript archive, onto the CPU.

    torch's restricted reader is tried first; if it rejects an object, the reader of this module is used.

    Args:
        path: the file, in torch's zip format or the format before torch 1.6.

    Returns:
        The saved object. Objects of other classes are `Inert`, and an argparse.Namespace is a dict. Tensors may
        be read from the file when they are first used, so it must not be changed meanwhile.

    Raises:
        UserError: when the file is missing, damaged, of another format, or requests a call that is not allowed.
    """
    if not path.is_file():
        raise UserError(f"there is no file at {path}; check the path")
    try:
        with bounded_time(path):
            return _read(path)
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}: {first_line(error)}); it is "
            "truncated, damaged, not a file of torch.save, or unsafe. Obtain it again from its publisher"
        ) from error


def _read(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    if is_zip and check_archive(path):
        return _read_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what it will refuse
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNREADABLE:
        return _read_zip(path) if is_zip else _read_legacy(path)


def check_archive(path: Path) -> bool:
    """Compare the checksums of an archive, which torch does not (about 1 s per GB).

    Args:
        path: a file of `torch.save`, in torch's zip format.

    Returns:
        Whether it is a TorchScript archive.

    Raises:
        ValueError: when a checksum is wrong, or the archive unpacks to more than such files do.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > _MAX_UNPACKED * (path.stat().st_size + 2**20):
            raise ValueError(f"it unpacks to {unpacked} bytes, too many for a file of its size")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} is wrong")
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        # With a private mapping, only the pages of used tensors are read, and the file is never modified.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if pickled is None:
            raise ValueError("the archive holds no data.pkl")
        folder = pickled.removesuffix("data.pkl")
        if folder + "byteorder" in archive.namelist() and archive.read(folder + "byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        known: dict[str, _Storage] = {}

        def read_storage(key: str, dtype: torch.dtype, numel: int) -> _Storage:
            if key not in known:
                content_bytes = _entry(archive, content, name=folder + "data/" + key)
                if content_bytes.numel() < numel * dtype.itemsize:
                    raise ValueError(f"storage {key} is too short")
                known[key] = _Storage(dtype, content_bytes[: numel * dtype.itemsize])
            return _Storage(dtype, known[key].content_bytes)

        with archive.open(pickled) as stream:
            return _InertUnpickler(stream, read_storage).load()  # type: ignore[arg-type]


def _entry(archive: zipfile.ZipFile, content: mmap.mmap, *, name: str) -> Tensor:
    """Return the bytes of a zip entry, uint8; they are mapped if the entry is not compressed."""
    info = archive.getinfo(name)
    if info.file_size == 0:
        return torch.empty(0, dtype=torch.uint8)
    if info.compress_type != zipfile.ZIP_STORED:
        return torch.frombuffer(bytearray(archive.read(info)), dtype=torch.uint8)
    # The name and extra field of the local header may be longer than those of the directory.
    lengths = struct.unpack_from("<HH", content, info.header_offset + _ZIP_LOCAL_HEADER - 4)
    start = info.header_offset + _ZIP_LOCAL_HEADER + sum(lengths)
    return torch.frombuffer(content, dtype=torch.uint8, count=info.file_size, offset=start)


def _read_legacy(path: Path) -> Any:
    """Read the format before torch 1.6: several pickles, then the storages in the order of their keys."""
    size_bytes = path.stat().st_size
    storages: dict[str, _Storage] = {}

    def reserve(key: str, dtype: torch.dtype, numel: int) -> _Storage:
        if numel * dtype.itemsize > size_bytes:
            raise ValueError(f"storage {key} is longer than the file")
        if key not in storages:
            storages[key] = _Storage(dtype, torch.empty(numel * dtype.itemsize, dtype=torch.uint8))
        return storages[key]

    with open(path, "rb") as file:
        if _InertUnpickler(file, reserve).load() != _LEGACY_MAGIC:
            raise ValueError("it does not begin as torch files do")
        for _ in ("protocol version", "description of the machine"):
            _InertUnpickler(file, reserve).load()
        content = _InertUnpickler(file, reserve).load()
        for key in _InertUnpickler(file, reserve).load():
            (numel,) = struct.unpack("<q", file.read(8))
            target = storages[key].content_bytes
            if numel * storages[key].dtype.itemsize != target.numel():
                raise ValueError(f"storage {key} has another length than its tensors")
            if file.readinto(target.numpy().data) != target.numel():
                raise EOFError(f"storage {key} is cut short")
    return content


def find_state_dict(content: Any, *, source: str) -> dict[str, Tensor]:
    """Find the parameters in the content of a file.

    Args:
        content: output of `read_torch_file`: a state dict, a dict that contains one as `model`, `module` or
            `state_dict` (the first of these is used), or a TorchScript module.
        source: the file, for messages.

    Returns:
        Parameter name to tensor.

    Raises:
        UserError: when there is no state dict, or an entry is not a tensor; names the entry.
    """
    if isinstance(content, Inert):
        state: Any = dict(_tensors_of_module(content, source))
    else:
        state = content
        if isinstance(content, Mapping):
            state = next((content[k] for k in ("model", "module", "state_dict") if k in content), content)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor | Inert) for value in state.values()):
        raise UserError(
            f"{source} contains no weights (no state dict); give a checkpoint with those of a model"
        )
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = value.origin if isinstance(value, Inert) else type(value).__name__
            raise UserError(
                f"{source}: {shown(key)} in its state dict is a {kind}, not a tensor; it cannot be used"
            )
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(
                f"{source}: {shown(key)} claims more numbers than the file holds; it cannot be used"
            )
    return dict(state)


def _tensors_of_module(top: Inert, source: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a TorchScript module and of its submodules, which may share parts."""
    waiting, seen = [("", top)], 0
    while waiting:
        prefix, module = waiting.pop()
        seen += 1
        if seen > _MAX_MODULES:
            raise UserError(f"{source} contains endlessly nested modules; it is damaged or not trustworthy")
        for name, value in module.state.items() if isinstance(module.state, dict) else ():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Inert) and isinstance(name, str):
                waiting.append((f"{prefix}{name}.", value))
