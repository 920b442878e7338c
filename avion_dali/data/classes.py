"""Tables that the rows of a manifest refer to: classes, and captions with relevancy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from avion_dali.contracts import UserError
from avion_dali.data.tables import ROWS_PER_BATCH, MappedTable, write_table
from avion_dali.files import atomic_write_text, whole_or_absent

CLASSES_FILE, CAPTIONS_FILE, RELEVANCY_FILE = "classes.json", "captions.arrow", "relevancy.npy"
_CAPTION_SCHEMA = pa.schema([("text", pa.string()), ("tokens", pa.list_(pa.uint16()))])
_BLOCK_GRADES = 1 << 24  # relevancies in memory at a time while writing


@dataclass(frozen=True, slots=True)
class ClassTable:
    """The classes of a recognition task; a row's label is an index into this table.

    Args:
        names: unique class names in label order.
        verbs: verb id of each class, for actions; otherwise empty.
        nouns: noun id of each class, for actions; otherwise empty.

    Raises:
        ValueError: when a name repeats, or the numbers of ids and names differ.
    """

    names: tuple[str, ...]
    verbs: tuple[int, ...] = ()
    nouns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise ValueError("a class name repeats")
        if self.verbs or self.nouns:
            sizes = (len(self.names), len(self.verbs), len(self.nouns))
            if len(set(sizes)) > 1:
                raise ValueError(f"{sizes[0]} classes need as many verb and noun ids, got {sizes[1:]}")

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class CaptionTable:
    """Captions and their relevancy to the rows of a manifest.

    Args:
        texts: the captions.
        tokens: token ids of each caption.
        relevancy: array (rows, captions) in [0, 1], rows as in the manifest; or a `.npy` file with this array.

    Raises:
        ValueError: when the numbers of texts and token lists differ.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    relevancy: np.ndarray | Path

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.tokens):
            raise ValueError(f"{len(self.texts)} captions need one token list each, got {len(self.tokens)}")


def write_classes(path: Path, classes: ClassTable) -> None:
    """Store the classes of a manifest.

    Args:
        path: its `classes.json`.
        classes: what to store.
    """
    plain = {"names": classes.names, "verbs": classes.verbs, "nouns": classes.nouns}
    text = json.dumps(plain, ensure_ascii=False, indent=1) + "\n"
    atomic_write_text(path, text)


def read_classes(path: Path) -> ClassTable:
    """Read the classes of a manifest.

    Args:
        path: its `classes.json`.

    Raises:
        UserError: when the file is missing or damaged.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return ClassTable(**{name: tuple(plain[name]) for name in ("names", "verbs", "nouns")})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable class table ({error}); build the manifest again") from error


def write_captions(folder: Path, captions: CaptionTable, *, num_rows: int) -> list[int]:
    """Store captions and the rows' grades.

    Args:
        folder: where the manifest's files are written.
        captions: what to store.
        num_rows: clips of the manifest.

    Returns:
        Where the batches of `captions.arrow` end, see `TableWriter`.

    Raises:
        UserError: when the relevancy does not fit the rows or is not in [0, 1].
    """
    rows = list(zip(captions.texts, captions.tokens, strict=True))
    table = write_table(
        folder / CAPTIONS_FILE,
        _CAPTION_SCHEMA,
        rows=rows,
        columns=lambda block: {"text": [text for text, _ in block], "tokens": [ids for _, ids in block]},
        rows_per_batch=ROWS_PER_BATCH,
    )
    source = captions.relevancy
    grades_RC = np.load(source, mmap_mode="r") if isinstance(source, Path) else source
    if grades_RC.shape != (num_rows, len(rows)):
        raise UserError(
            f"relevancy of shape {grades_RC.shape} does not fit {num_rows} rows and {len(rows)} captions"
        )
    write_relevancy(folder / RELEVANCY_FILE, grades_RC, np.arange(num_rows))
    return table.ends


def write_relevancy(path: Path, grades_RC: np.ndarray, rows: np.ndarray) -> None:
    """Write the relevancy of some rows as float32, block by block.

    Args:
        path: the `.npy` file; an existing one is replaced.
        grades_RC: array (rows, captions) in [0, 1].
        rows: int64 array of the rows to write, in this order.

    Raises:
        UserError: when a relevancy is not in [0, 1].
    """
    shape = (len(rows), grades_RC.shape[1])
    step = max(_BLOCK_GRADES // max(shape[1], 1), 1)
    with whole_or_absent(path) as partial, partial.open("wb") as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype("<f4")),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(rows), step):
            block_RC = np.asarray(grades_RC[rows[start : start + step]], dtype="<f4")
            if not ((block_RC >= 0) & (block_RC <= 1)).all():
                raise UserError("a relevancy is not in [0, 1]; check the relevancy file")
            file.write(np.ascontiguousarray(block_RC).data)


def read_captions(table: MappedTable, path: Path, *, num_rows: int) -> CaptionTable:
    """Read stored captions; the grades stay on disk and are mapped.

    Args:
        table: the manifest's `captions.arrow`.
        path: its `relevancy.npy`.
        num_rows: clips of the manifest.

    Raises:
        UserError: when a file is missing, damaged or belongs to another manifest.
    """
    batches = list(table.batches())
    texts = tuple(text for batch in batches for text in batch["text"].to_pylist())
    tokens = tuple(tuple(ids) for batch in batches for ids in batch["tokens"].to_pylist())
    try:
        grades_RC = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); build the manifest again") from error
    if grades_RC.shape != (num_rows, len(texts)) or grades_RC.dtype != np.float32:
        raise UserError(
            f"{path} contains {grades_RC.dtype} of shape {grades_RC.shape}, the manifest has {num_rows} rows "
            f"and {len(texts)} captions; build it again"
        )
    return CaptionTable(texts, tokens, grades_RC)
