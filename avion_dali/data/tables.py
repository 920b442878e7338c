"""Arrow tables on disk: written in record batches of equal size, read through memory maps without copies.

The strings of a batch stay far below Arrow's 2 GB limit, and a row is located by division. Opening reads no
rows, and all processes share memory pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
        rows_per_batch: the number with which it was written.

    Raises:
        UserError: when it is not a readable Arrow file.
    """

    def __init__(self, path: Path, *, rows_per_batch: int) -> None:
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} is not a readable manifest table ({error}); build it again") from error
        self._rows_per_batch = rows_per_batch
        self._batches: dict[int, pa.RecordBatch] = {}
        self.num_batches = self._reader.num_record_batches
        last = self.num_batches - 1
        self.num_rows = max(last, 0) * rows_per_batch + (self.batch(last).num_rows if last >= 0 else 0)

    def batch(self, index: int) -> pa.RecordBatch:
        """Return a record batch."""
        if index not in self._batches:
            self._batches[index] = self._reader.get_batch(index)
        return self._batches[index]

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


def write_table(
    path: Path,
    schema: pa.Schema,
    *,
    rows: Iterable[Row],
    columns: Callable[[list[Row]], dict[str, Any]],
    rows_per_batch: int,
) -> int:
    """Write rows in batches; only one batch is in memory at a time.

    Args:
        path: the file; an existing one is replaced, and processes that have mapped it can still read it.
        schema: schema of the table.
        rows: the rows to write.
        columns: converts a batch of rows to the values of each column.
        rows_per_batch: number of rows per batch.

    Returns:
        The number of rows.
    """
    count = 0
    with (
        whole_or_absent(path) as partial,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for block in _blocks(rows, rows_per_batch):
            values = columns(block)
            arrays = [pa.array(values[field.name], field.type) for field in schema]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            count += len(block)
    return count


def _blocks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while block := list(islice(remaining, size)):
        yield block
