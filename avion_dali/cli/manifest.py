"""`avion-dali manifest`: makes a manifest. Workers import this module again, so it imports little."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from avion_dali.contracts import UserError
from avion_dali.wording import printable

if TYPE_CHECKING:
    from tqdm import tqdm

    from avion_dali.datasets.building import BuildReport, BuildSettings

Progress = Callable[[int], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, dataset in DATASETS.items():
        dataset.add_arguments(kinds.add_parser(name, help=dataset.help))


def run(options: argparse.Namespace) -> int:
    """Make the manifest, and print what it contains and what was left out."""
    from avion_dali.data.scanning import ChunkNames
    from avion_dali.datasets.building import BuildSettings

    with _progress() as (on_chunk, on_row):
        settings = BuildSettings(
            chunk_root=options.chunks,
            output=options.output,
            skip_bad_rows=options.skip_bad_rows,
            jobs=options.jobs,
            on_chunk=on_chunk,
            on_row=on_row,
            names=ChunkNames(options.chunk_names or "", options.chunk_seconds or 0.0),
        )
        report = DATASETS[options.kind].build(options, settings)
    print(printable("\n".join(summary(report, options.output))))
    return 0


@dataclass(frozen=True)
class Dataset:
    """A kind of annotation files.

    Args:
        help: one line for `avion-dali manifest --help`.
        add_arguments: declares the options; `add_common_arguments` declares those that all datasets share.
        build: makes the manifest from parsed options and settings.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    build: Callable[[argparse.Namespace, BuildSettings], BuildReport]


def add_common_arguments(
    parser: argparse.ArgumentParser, *, annotations: str, several: bool = False, chunks: bool = True
) -> None:
    """Declare the options that all datasets share.

    Args:
        parser: parser of the dataset.
        annotations: help of `--annotations`.
        several: whether several annotation files are accepted.
        chunks: whether `--chunks` is required; otherwise the dataset declares the folder of its files.
    """
    if chunks:
        parser.add_argument("--chunks", required=True, type=Path, help="chunk folder")
    number = "+" if several else None
    parser.add_argument("--annotations", required=True, type=Path, nargs=number, help=annotations)
    parser.add_argument("--output", required=True, type=Path, help="manifest folder to write")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave unusable rows out")
    parser.add_argument("--jobs", default=0, type=int, help="probing processes (default: one per core)")
    names = "chunk file names are start seconds (default), or numbers of chunks of --chunk-seconds each"
    parser.add_argument("--chunk-names", choices=("start", "index"), help=names)
    parser.add_argument("--chunk-seconds", type=float, help="length of a chunk, if names are numbers")


def _add_captions(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, annotations=".csv or .jsonl file")
    parser.add_argument("--classes-from", type=Path, help="manifest whose class table the labels refer to")


def _build_captions(options: argparse.Namespace, settings: BuildSettings) -> BuildReport:
    from avion_dali.datasets.captions import read_captions_into

    return read_captions_into(settings, options.annotations, classes_from=options.classes_from)


def _add_ego4d(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, annotations=".pkl files, whose rows are concatenated", several=True)


def _build_ego4d(options: argparse.Namespace, settings: BuildSettings) -> BuildReport:
    from avion_dali.datasets.ego4d import build_ego4d_manifest

    return build_ego4d_manifest(settings, options.annotations)


def _add_ek100(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, annotations="EPIC_100_*.csv")
    parser.add_argument("--task", required=True, choices=("recognition", "retrieval"))
    classes = "recognition: the train and the validation file (default: beside the annotations)"
    parser.add_argument("--classes-from", type=Path, nargs="+", metavar="CSV", default=[], help=classes)
    parser.add_argument("--sentences", type=Path, help="retrieval: EPIC_100_retrieval_*_sentence.csv")
    parser.add_argument("--relevancy", type=Path, help="retrieval: caption_relevancy_*.pkl")


def _build_ek100(options: argparse.Namespace, settings: BuildSettings) -> BuildReport:
    from avion_dali.datasets.ek100 import Retrieval, build_recognition_manifest, build_retrieval_manifest

    if (options.sentences is None) != (options.relevancy is None):
        raise UserError(
            "--sentences and --relevancy must be given together: the matrix has a column per sentence"
        )
    if options.task == "recognition":
        if options.sentences is not None:
            raise UserError("--sentences and --relevancy are for --task retrieval")
        return build_recognition_manifest(settings, options.annotations, classes_from=options.classes_from)
    if options.classes_from:
        raise UserError("--classes-from is for --task recognition")
    retrieval = None if options.sentences is None else Retrieval(options.sentences, options.relevancy)
    return build_retrieval_manifest(settings, options.annotations, retrieval)


def _add_kinetics(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, annotations="list of videos with labels", chunks=False)
    root = parser.add_mutually_exclusive_group(required=True)
    root.add_argument("--videos", type=Path, help="folder that contains the listed video files")
    root.add_argument("--chunks", type=Path, help="chunk folder of the listed videos")
    parser.add_argument("--class-names", type=Path, help="text file, one class name per line in label order")


def _build_kinetics(options: argparse.Namespace, settings: BuildSettings) -> BuildReport:
    from avion_dali.datasets.kinetics import build_kinetics_manifest

    whole_files = options.videos is not None
    settings = replace(settings, chunk_root=options.videos if whole_files else options.chunks)
    return build_kinetics_manifest(
        settings, options.annotations, whole_files=whole_files, class_names=options.class_names
    )


DATASETS: dict[str, Dataset] = {
    "captions": Dataset(
        "CSV or JSON lines: video, text[, start, end, verb, noun, label]", _add_captions, _build_captions
    ),
    "ego4d": Dataset("pickled narrations of Ego4D in the format of LaViLa and AVION", _add_ego4d, _build_ego4d),
    "ek100": Dataset("CSV files of EPIC-KITCHENS-100", _add_ek100, _build_ek100),
    "kinetics": Dataset("lists `path label` or `path frames label`", _add_kinetics, _build_kinetics),
}
"""The datasets by KIND of `avion-dali manifest`."""


def summary(report: BuildReport, output: Path) -> list[str]:
    """Return the lines that are printed about a finished manifest."""
    from avion_dali.datasets.building import REJECTED_FILE, UNUSABLE_FILE

    texts = "" if report.num_texts == report.num_samples else f" with {report.num_texts} texts"
    lines = [f"{output}: {report.num_samples} clips{texts} over {report.num_chunks} chunks", *report.notes]
    if report.rejected:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.rejected.items())
        lines.append(
            f"{sum(report.rejected.values())} rows left out, listed in {output / REJECTED_FILE}: {kinds}"
        )
    if report.unusable:
        lines.append(f"{len(report.unusable)} chunk files left out, listed in {output / UNUSABLE_FILE}")
    return lines


class _Bar:
    """A progress bar that appears with its first step."""

    def __init__(self, unit: str, description: str) -> None:
        self._unit, self._description = unit, description
        self._bar: tqdm[NoReturn] | None = None

    def show(self, done: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(unit=self._unit, desc=self._description)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def _progress() -> Iterator[tuple[Progress, Progress]]:
    """Show a progress bar for files, and then one for rows."""
    with closing(_Bar("file", "probing")) as files, closing(_Bar("row", "rows")) as rows:
        yield files.show, rows.show
