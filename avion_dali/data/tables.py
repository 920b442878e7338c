"""Arrow tables on disk: written in record batches of equal size, read through memory maps without copies.

The strings of a batch stay far below Arrow's 2 GB limit, and a row is located by division. Opening reads no
rows, and all processes share memory pages.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from avion_dali.contracts import UserError
from avion_dali.files import whole_or_absent

ROWS_PER_BATCH = 65_536
Row = TypeVar("Row")
Values = TypeVar("Values")


@dataclass(frozen=True, slots=True)
class Strings:
    """A column of strings.

    Args:
        offsets: R + 1 positions in `data`.
        data: UTF-8 bytes of all rows.
    """

    offsets: memoryview
    data: memoryview

    def at(self, row: int) -> str:
        """Return the string of one row."""
        return str(self.data[self.offsets[row] : self.offsets[row + 1]], "utf-8")


@dataclass(frozen=True, slots=True)
class Lists(Generic[Values]):
    """A column of lists.

    Args:
        offsets: R + 1 positions in `values`.
        values: the items of all rows.
    """

    offsets: memoryview
    values: Values

    def range(self, row: int) -> range:
        """Return the positions of one row's items."""
        return range(self.offsets[row], self.offsets[row + 1])


class MappedTable:
    """A memory-mapped Arrow file in which every batch except the last has `rows_per_batch` rows.

    Args:
        path: the file.
        rows_per_batch: as it was written.
        checksums: where each block ends, and the CRC-32 of its bytes: what comes before the first batch, each
            batch, what comes after the last. A block is checked when it is first read.

    Raises:
        UserError: when it is no Arrow file, or damaged.
    """

    def __init__(self, path: Path, *, rows_per_batch: int, checksums: Sequence[tuple[int, int]] = ()) -> None:
        self._path, self._checksums = path, checksums
        try:
            self._map = pa.memory_map(str(path))
            if checksums and self._map.size() != checksums[-1][0]:
                raise self._damage(f"it has {self._map.size()} bytes instead of {checksums[-1][0]}")
            for block in {0, len(checksums) - 1} if checksums else ():
                self._check(block)
            self._reader = pa.ipc.open_file(self._map)
        except (OSError, pa.ArrowInvalid) as error:
            raise self._damage(str(error)) from error
        self._rows_per_batch = rows_per_batch
        self._batches: dict[int, pa.RecordBatch] = {}
        self.num_batches = self._reader.num_record_batches
        last = self.num_batches - 1
        self.num_rows = max(last, 0) * rows_per_batch + (self.batch(last).num_rows if last >= 0 else 0)

    def batch(self, index: int) -> pa.RecordBatch:
        """Return a record batch.

        Args:
            index: in [0, num_batches).

        Raises:
            UserError: when it is damaged.
        """
        if index not in self._batches:
            if self._checksums:
                self._check(index + 1)
            self._batches[index] = self._reader.get_batch(index)
        return self._batches[index]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all record batches, in order; see `batch`."""
        return map(self.batch, range(self.num_batches))

    def _check(self, block: int) -> None:
        start = self._checksums[block - 1][0] if block else 0
        end, expected = self._checksums[block]
        self._map.seek(start)
        if zlib.crc32(self._map.read_buffer(end - start)) != expected:
            raise self._damage(f"the checksum of bytes {start} to {end} is wrong")

    def _damage(self, cause: str) -> UserError:
        return UserError(f"{self._path} is not a readable manifest table ({cause}); build it again")

    def locate(self, row: int) -> tuple[int, int]:
        """Return the batch that contains a row, and the row's position in it.

        Args:
            row: in [0, num_rows).

        Raises:
            IndexError: when the table has no such row.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} outside [0, {self.num_rows})")
        return divmod(row, self._rows_per_batch)


def numbers(column: pa.Array) -> memoryview:
    """Return a zero-copy view of a column of numbers; items of a memoryview are Python numbers and fast."""
    return memoryview(column.to_numpy(zero_copy_only=True))


def strings(column: pa.Array) -> Strings:
    """Return a zero-copy view of a column of strings."""
    _, offsets, data = column.buffers()
    if offsets is None or not len(column):
        return Strings(memoryview(b""), memoryview(b""))
    view = memoryview(offsets).cast("b").cast("i")[column.offset : column.offset + len(column) + 1]
    return Strings(view, memoryview(data if data is not None else b""))


def lists(column: pa.Array, values: Callable[[pa.Array], Values]) -> Lists[Values]:
    """Return a zero-copy view of a column of lists.

    Args:
        column: a list array.
        values: creates the view of its items.
    """
    return Lists(numbers(column.offsets), values(column.values))


class TableWriter:
    """Writes record batches to an Arrow file, and notes where they lie; a context manager.

    Args:
        path: the file.
        schema: of the table.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        self.num_rows = 0
        # Where the head and each batch end in the file: borders of the blocks that have checksums.
        self.ends = [int(self._sink.tell())]

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch.

        Args:
            batch: of as many rows as the others, but for the last.
        """
        self._writer.write_batch(batch)
        self.num_rows += batch.num_rows
        self.ends.append(int(self._sink.tell()))

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._writer.close()
        finally:
            self._sink.close()


def write_table(
    path: Path,
    schema: pa.Schema,
    *,
    rows: Iterable[Row],
    columns: Callable[[list[Row]], dict[str, Any]],
    rows_per_batch: int,
) -> TableWriter:
    """Write rows as they come; only one batch of them is held.

    Args:
        path: the file; an existing one is replaced, and processes that have mapped it can still read it.
        schema: schema of the table.
        rows: the rows to write.
        columns: converts a batch of rows to the values of each column.
        rows_per_batch: number of rows per batch.

    Returns:
        The closed writer, which knows the number of rows and where batches end.
    """
    with whole_or_absent(path) as partial, TableWriter(partial, schema) as writer:
        for block in _blocks(rows, rows_per_batch):
            values = columns(block)
            arrays = [pa.array(values[field.name], field.type) for field in schema]
            writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return writer


def _blocks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while block := list(islice(remaining, size)):
        yield block
