"""`avion-dali env`: reports what works on this machine, and the reason and remedy for what does not.

Features are tested where possible instead of being derived from versions. This module imports little, so that
it can also report a broken installation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata, util
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from avion_dali.assembly.dali_room import pipelines_module
from avion_dali.contracts import UserError
from avion_dali.cores import available_cores
from avion_dali.subprocess_call import call_in_subprocess, import_modules

if TYPE_CHECKING:
    from pipelines import support
else:
    support = pipelines_module("support")

GIB = 2**30
FIELDS = ("value", "problem", "essential")
ENCODERS = ("libx264", "libx265", "libvpx-vp9", "libsvtav1")
# Importing what a training imports, and the tokenizer of manifests, finds missing and broken packages.
ESSENTIAL_IMPORTS = {"training code": "avion_dali.assembly.training", "tokenizer": "open_clip.tokenizer"}
OPTIONAL_KERNELS = {"flash-attn": "flash_attn", "xformers": "xformers.ops"}
IMPORT_TIMEOUT_S = 300.0  # long enough for a shared disk without cached files
_REINSTALL = "pip install --upgrade --force-reinstall"
_INSTALL = "install avion_dali and its requirements again with pip"


@dataclass(frozen=True, slots=True)
class EnvironmentRow:
    """One line of the report.

    Args:
        name: what was tested.
        value: the result.
        problem: reason and remedy in one line; None if it works.
        essential: whether training is impossible if there is a problem.
    """

    name: str
    value: str
    problem: str | None = None
    essential: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """The report of all tests.

    Args:
        sections: rows by title of the section.
        decoder: the decoder that `--decoder auto` selects.
        why: the reason.
    """

    sections: dict[str, list[EnvironmentRow]]
    decoder: str
    why: str

    @property
    def obstacles(self) -> list[EnvironmentRow]:
        """The problems that make training impossible."""
        return [f for findings in self.sections.values() for f in findings if f.essential and f.problem]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser: parser of the subcommand.
    """
    parser.add_argument("--json", action="store_true", help="print JSON, for programs and bug reports")


def run(options: argparse.Namespace) -> int:
    """Test this machine and print the report; status 1 if training is impossible.

    Args:
        options: parsed arguments.
    """
    report = examine()
    print("\n".join([json.dumps(as_plain(report), indent=2)] if options.json else table_lines(report)))
    return 1 if report.obstacles else 0


def examine() -> Report:
    """Run all tests; tests in separate processes run in parallel."""
    with ThreadPoolExecutor(max_workers=6) as pool:
        nvdec = pool.submit(support.codec_support, 0)
        cpu_codecs = pool.submit(support.cpu_codec_support)
        dali = pool.submit(support.dali_cpu_problem)
        imports = [
            pool.submit(_import_finding, *i, _INSTALL, essential=True) for i in ESSENTIAL_IMPORTS.items()
        ]
        kernels = [pool.submit(_optional_finding, *names) for names in OPTIONAL_KERNELS.items()]
        sections = {
            "machine": machine_findings(),
            "PyTorch": torch_findings(),
            "attention": [*attention_findings(), *(kernel.result() for kernel in kernels)],
            "decoding on GPU 0": [_nvcuvid_finding(), *_codec_findings("NVDEC", nvdec.result())],
            "decoding on the CPU": [
                *ffmpeg_findings(),
                *_codec_findings("cpu-fused", cpu_codecs.result(), one_must_work=True),
                _dali_finding(dali.result()),
            ],
            "software": [*(done.result() for done in imports), *requirement_findings()],
        }
    h264 = nvdec.result()["h264"]
    return Report(sections, *support.auto_decoder(None if h264 == support.WORKS else h264))


def as_plain(report: Report) -> dict[str, Any]:
    """Return a report as plain values for JSON.

    Args:
        report: the report.
    """
    return {
        "can_train": not report.obstacles,
        "decoder_auto": {"decoder": report.decoder, "why": report.why},
        "sections": {
            title: {f.name: {name: getattr(f, name) for name in FIELDS} for f in findings}
            for title, findings in report.sections.items()
        },
    }


def table_lines(report: Report) -> Iterator[str]:
    """Yield a report's lines; a problem is printed once below the lines that share it.

    Args:
        report: the report.
    """
    width = max(len(f.name) for findings in report.sections.values() for f in findings)
    for title, findings in report.sections.items():
        yield title
        for problem, sharing in groupby(findings, key=lambda f: f.problem):
            yield from (f"{'!' if problem else ' '} {f.name:<{width}}  {f.value}" for f in sharing)
            if problem:
                yield f"    -> {problem}"
        yield ""
    yield f"--decoder auto selects {report.decoder}: {report.why}"
    names = ", ".join(finding.name for finding in report.obstacles)
    yield f"This environment cannot train: see {names}" if names else "This environment can train."


def machine_findings() -> list[EnvironmentRow]:
    """Report the machine: system, cores, memory, shared memory and disk."""
    ring = "the loader keeps batches there (0.6 GiB per rank for 256 clips of 4 frames)"
    return [
        EnvironmentRow("platform", platform.platform()),
        EnvironmentRow("Python", platform.python_version()),
        EnvironmentRow("cores", f"{available_cores()} usable of {os.cpu_count()}"),
        EnvironmentRow("memory", _memory()),
        _space_finding(
            "shared memory",
            Path("/dev/shm"),
            enough_gib=1,
            advice=f"{ring}; start containers with --shm-size=16g",
        ),
        _space_finding(
            "disk", Path.cwd(), enough_gib=5, advice="a checkpoint of ViT-B takes 2; use another output_dir"
        ),
    ]


def _space_finding(name: str, place: Path, *, enough_gib: float, advice: str) -> EnvironmentRow:
    """Report the free space of a file system."""
    if not place.exists():  # /dev/shm on systems other than Linux
        return EnvironmentRow(name, f"no {place} on this system")
    usage = shutil.disk_usage(place)
    value = f"{place}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    short = usage.free < enough_gib * GIB
    return EnvironmentRow(name, value, f"less than {enough_gib:g} GiB free, {advice}" if short else None)


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    parts = [f"{total:.1f} GiB"]
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    if available:
        parts.append(f"{int(available[1]) * 1024 / GIB:.1f} GiB available")
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        parts.append(f"this container may use {int(limit) / GIB:.1f} GiB")
    return ", ".join(parts)


def _text(path: str) -> str:
    """Return the content of a file; empty if it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def torch_findings() -> list[EnvironmentRow]:
    """Report PyTorch, the driver and the GPUs."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [EnvironmentRow("torch", "broken", f"{error}; {_REINSTALL} torch", essential=True)]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    problem = support.cuda_problem(0)
    found = [EnvironmentRow("torch", f"{torch.__version__}, {build}"), EnvironmentRow("driver", _driver())]
    if problem:
        return [*found, EnvironmentRow("GPU", "none", problem)]
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        size, kind = f"{facts.total_memory / GIB:.1f} GiB", f"compute capability {facts.major}.{facts.minor}"
        found.append(EnvironmentRow(f"GPU {number}", f"{facts.name}, {size}, {kind}"))
    return found


def _driver() -> str:
    version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _text("/proc/driver/nvidia/version"))
    cuda = support.driver_cuda_version()
    if cuda is None:
        return "none"
    return f"{version[0] if version else 'version unknown'}, supports CUDA {cuda[0]}.{cuda[1]}"


def attention_findings() -> list[EnvironmentRow]:
    """Run PyTorch's attention kernels, forward and backward, in the precision of training on this machine."""
    try:
        import torch
        from torch.nn.attention import SDPBackend

        from avion_dali.engine.precision import AUTOCAST_DTYPES, resolve_precision
        from avion_dali.models.attention import sdpa_problem
    except (ImportError, OSError) as error:
        return [EnvironmentRow("sdpa", "not tested", f"{error}; see software below", essential=True)]
    device = torch.device("cpu" if support.cuda_problem(0) else "cuda")
    precision = resolve_precision("auto", device)
    backends = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    found = []
    for name, backend in backends.items():
        if device.type == "cpu" and name in ("efficient", "cudnn"):
            found.append(EnvironmentRow(f"sdpa {name}", "for GPUs only"))
            continue
        problem = sdpa_problem(backend, device, dtype=AUTOCAST_DTYPES[precision])
        value = "does not work" if problem else f"{support.WORKS} ({precision} on {device})"
        found.append(EnvironmentRow(f"sdpa {name}", value, problem, essential=name == "math"))
    return found


def _optional_finding(package: str, module: str) -> EnvironmentRow:
    """Import an optional attention library, then run its kernel."""
    if util.find_spec(module.split(".")[0]) is None:
        return EnvironmentRow(package, "not installed (optional)")
    found = _import_finding(package, module, "it is optional: uninstall it, or build it for this PyTorch")
    return found if found.problem else _library_finding(found)


def _library_finding(imported: EnvironmentRow) -> EnvironmentRow:
    """Run the kernel of a library that can be imported, as `model.attention` does."""
    if support.cuda_problem(0):
        return replace(imported, value="can be imported; for GPUs only")
    try:
        import torch

        from avion_dali.engine.precision import AUTOCAST_DTYPES, resolve_precision
        from avion_dali.models.attention import resolve_attention
    except (ImportError, OSError):
        return imported  # reported in another row
    device = torch.device("cuda")
    precision = resolve_precision("auto", device)
    try:
        resolve_attention(imported.name, device, dtype=AUTOCAST_DTYPES[precision])  # type: ignore[arg-type]
    except UserError as error:
        return replace(imported, value="does not work", problem=str(error))
    return replace(imported, value=f"{support.WORKS} ({precision} on {device})")


def _import_finding(name: str, module: str, advice: str, *, essential: bool = False) -> EnvironmentRow:
    """Import a module in a separate process."""
    failure = call_in_subprocess(import_modules, module, timeout_s=IMPORT_TIMEOUT_S)
    problem = failure and f"import {module}: {failure}; {advice}"
    return EnvironmentRow(name, "cannot be imported" if problem else "can be imported", problem, essential)


def _nvcuvid_finding() -> EnvironmentRow:
    """Report the driver's video library; without a driver, the problem is the missing driver."""
    missing = support.nvcuvid_problem()
    problem = missing and (support.cuda_problem(0) or missing)
    return EnvironmentRow("libnvcuvid", "missing" if problem else "found", problem)


def _codec_findings(
    decoder: str, codecs: dict[str, str], *, one_must_work: bool = False
) -> list[EnvironmentRow]:
    """Return the rows for the results of decoding test clips."""
    essential = one_must_work and support.WORKS not in codecs.values()
    return [
        EnvironmentRow(f"{decoder} {codec}", support.WORKS, essential=essential)
        if outcome == support.WORKS
        else EnvironmentRow(f"{decoder} {codec}", "does not work", outcome, essential)
        for codec, outcome in codecs.items()
    ]


def ffmpeg_findings() -> list[EnvironmentRow]:
    """Report the FFmpeg inside PyAV."""
    try:
        import av
    except (ImportError, OSError) as error:
        return [EnvironmentRow("PyAV", "broken", f"{error}; {_REINSTALL} av", essential=True)]

    def known(names: Sequence[str], mode: Literal["r", "w"]) -> list[str]:
        return [name for name in names if _codec_exists(name, mode)]

    there = known(ENCODERS, "w")
    missing = [name for name in ENCODERS if name not in there]
    problem = f"{', '.join(missing)} missing, so chunks cannot be encoded with them; {_REINSTALL} av"
    return [
        EnvironmentRow("PyAV", f"{av.__version__} with FFmpeg {av.ffmpeg_version_info}"),
        EnvironmentRow("encoders", ", ".join(there) or "none", problem if missing else None),
        EnvironmentRow("decoders", ", ".join(known(support.CODECS, "r"))),
    ]


def _codec_exists(name: str, mode: Literal["r", "w"]) -> bool:
    import av

    try:
        av.Codec(name, mode)
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _dali_finding(problem: str | None) -> EnvironmentRow:
    """Report DALI on the CPU, where it decodes neither H.264 nor HEVC."""
    package = support.dali_package()
    version = " ".join(package) if package else "not installed by pip"
    return EnvironmentRow("DALI vp9", f"{version}, {'does not work' if problem else support.WORKS}", problem)


def requirement_findings() -> list[EnvironmentRow]:
    """Compare the installed versions with the requirements of this project."""
    try:
        from packaging.requirements import Requirement

        lines = metadata.requires("avion_dali") or []
    except ImportError as error:  # PackageNotFoundError is a subclass
        return [EnvironmentRow("requirements", "unknown", f"versions cannot be checked: {error}; {_INSTALL}")]
    dali, found = support.dali_package(), []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        # DALI's builds for other CUDA versions are packages with other names.
        name = dali[0] if dali and requirement.name.startswith("nvidia-dali") else requirement.name
        versions = [d.version for d in metadata.distributions(name=name)]
        fits = bool(versions) and requirement.specifier.contains(versions[0], prereleases=True)
        bounds = f"'{name}{requirement.specifier}'"
        problem = None if fits else f"{bounds} is required; pip install {bounds}"
        found.append(EnvironmentRow(name, versions[0] if versions else "missing", problem))
    return found
