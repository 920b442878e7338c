"""The report must be right about what works, and must appear whatever is broken."""

import argparse
import json
import shutil
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from avion_dali.cli import env
from avion_dali.contracts import UserError
from avion_dali.engine import precision
from avion_dali.models import attention
from pipelines import support

WORKING = dict.fromkeys(support.CODECS, "works")
NO_GPU = "there is no GPU"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What is tried in other processes is not tried: no NVDEC, all else works."""
    monkeypatch.setattr(support, "codec_support", lambda index: dict.fromkeys(support.CODECS, NO_GPU))
    monkeypatch.setattr(support, "cpu_codec_support", lambda: WORKING)
    monkeypatch.setattr(support, "dali_cpu_problem", lambda: None)
    monkeypatch.setattr(env, "call_in_subprocess", lambda task, module, timeout_s: None)
    return monkeypatch


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    env.add_arguments(parser)
    return env.run(parser.parse_args(arguments))


def by_name(findings: list[env.EnvironmentRow]) -> dict[str, env.EnvironmentRow]:
    return {finding.name: finding for finding in findings}


def test_json_holds_everything(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"can_train", "decoder_auto", "sections"}
    assert report["can_train"] is True
    assert report["decoder_auto"] == {"decoder": "cpu-fused", "why": NO_GPU}
    sections = report["sections"]
    for findings in sections.values():
        for finding in findings.values():
            assert set(finding) == {"value", "problem", "essential"}
            assert finding["value"]
            assert finding["problem"] is None or "\n" not in finding["problem"]
    machine, gpu, cpu = (sections[s] for s in ("machine", "decoding on GPU 0", "decoding on the CPU"))
    assert set(machine) == {"platform", "Python", "cores", "memory", "shared memory", "disk"}
    assert {f"NVDEC {codec}" for codec in support.CODECS} | {"libnvcuvid"} == set(gpu)
    assert all(gpu[f"NVDEC {codec}"]["problem"] == NO_GPU for codec in support.CODECS)
    assert all(cpu[f"cpu-fused {codec}"]["problem"] is None for codec in support.CODECS)
    assert sections["PyTorch"]["torch"]["value"].startswith(torch.__version__)
    assert sections["attention"]["sdpa math"]["problem"] is None
    assert {"flash-attn", "xformers"} < set(sections["attention"])
    needed = [Requirement(line) for line in metadata.requires("avion_dali") or [] if "extra ==" not in line]
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate():
            found = sections["software"][requirement.name]
            assert (found["value"], found["problem"]) == (metadata.version(requirement.name), None)


def test_the_table_says_each_problem_once(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(f"    -> {NO_GPU}") == 1
    marked = [line.split("  ")[0] for line in lines if line.startswith("! NVDEC")]
    assert marked == [f"! NVDEC {codec}" for codec in support.CODECS]
    assert f"--decoder auto selects cpu-fused: {NO_GPU}" in lines
    assert lines[-1] == "This environment can train."


def test_auto_takes_dali_where_nvdec_decodes_h264(quick: pytest.MonkeyPatch) -> None:
    quick.setattr(support, "codec_support", lambda index: WORKING | {"av1": "no such engine"})
    assert env.examine().decoder == "dali"


def test_what_a_training_cannot_do_without_decides_the_status(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"open_clip.tokenizer": "ImportError: ftfy is too old"}
    quick.setattr(env, "call_in_subprocess", lambda task, module, timeout_s: broken.get(module))
    assert run() == 1
    out = capsys.readouterr().out
    assert "import open_clip.tokenizer: ImportError: ftfy is too old; install avion_dali" in out
    assert out.splitlines()[-1] == "This environment cannot train: see tokenizer"


@pytest.mark.parametrize(("working", "status"), [(["vp9"], 0), ([], 1)])
def test_one_codec_is_enough(quick: pytest.MonkeyPatch, working: list[str], status: int) -> None:
    outcome = {codec: "works" if codec in working else "wrong pictures" for codec in support.CODECS}
    quick.setattr(support, "cpu_codec_support", lambda: outcome)
    assert run() == status


@pytest.mark.parametrize(("module", "names"), [("torch", {"torch", "sdpa"}), ("av", {"PyAV"})])
def test_a_broken_package_keeps_nothing_else_from_being_reported(
    quick: pytest.MonkeyPatch, module: str, names: set[str]
) -> None:
    quick.setitem(sys.modules, module, None)
    report = env.examine()
    assert names <= {finding.name for finding in report.obstacles}
    assert by_name(report.sections["machine"])["Python"].problem is None


def test_imports_are_tried_for_real() -> None:
    found = env._import_finding("it", "no_such_module", "install it", essential=True)
    assert found.problem == (
        "import no_such_module: ModuleNotFoundError: No module named 'no_such_module'; install it"
    )
    assert env._import_finding("it", "email.message", "install it").problem is None


def test_an_optional_library_that_is_broken_is_a_problem_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN2at')")
    monkeypatch.syspath_prepend(tmp_path)
    found = env._optional_finding("flash-attn", "flash_attn")
    assert "undefined symbol: _ZN2at; it is optional" in str(found.problem)
    assert not found.essential
    assert env._optional_finding("other", "no_such_module.part").problem is None


def test_the_kernel_of_an_optional_library_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(support, "cuda_problem", lambda device: "no driver")
    assert env._optional_finding("flash-attn", "flash_attn").value == "can be imported; for GPUs only"
    monkeypatch.setattr(support, "cuda_problem", lambda device: None)
    monkeypatch.setattr(precision, "resolve_precision", lambda name, device: "bf16")
    asked = []
    monkeypatch.setattr(attention, "resolve_attention", lambda *args, dtype: asked.append((*args, dtype)))
    found = env._optional_finding("flash-attn", "flash_attn")
    assert (found.value, found.problem) == ("works (bf16 on cuda)", None)
    assert asked == [("flash-attn", torch.device("cuda"), torch.bfloat16)]

    def refuse(*_: object, dtype: object) -> None:
        raise UserError("built for another GPU; set it to auto or sdpa")

    monkeypatch.setattr(attention, "resolve_attention", refuse)
    found = env._optional_finding("flash-attn", "flash_attn")
    assert (found.value, found.essential) == ("does not work", False)
    assert "another GPU" in str(found.problem)


def test_versions_out_of_bounds_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "numpy>=99",
        "no-such-package<3,>=1",
        "tqdm",
        'av>99; extra == "dev"',
        'av>99; python_version < "3"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    found = by_name(env.requirement_findings())
    assert set(found) == {"numpy", "no-such-package", "tqdm"}
    assert found["numpy"].problem == "'numpy>=99' is required; pip install 'numpy>=99'"
    assert found["no-such-package"].value == "missing"
    assert found["tqdm"].problem is None


def test_dali_for_another_cuda_version_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["nvidia-dali-cuda999>=1"])
    monkeypatch.setattr(support, "dali_package", lambda: ("numpy", "2"))
    (found,) = env.requirement_findings()
    assert (found.name, found.problem) == ("numpy", None)


def test_without_metadata_versions_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    (found,) = env.requirement_findings()
    assert "install avion_dali and its requirements again with pip" in str(found.problem)


def test_too_little_space_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2**36, 0, 2**26))
    found = by_name(env.machine_findings())
    assert "--shm-size" in str(found["shared memory"].problem) or not Path("/dev/shm").exists()
    assert "output_dir" in str(found["disk"].problem)
    assert found["disk"].value.endswith("0.1 of 64.0 GiB free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2**36, 0, 2**35))
    assert by_name(env.machine_findings())["disk"].problem is None
    assert env._space_finding("x", tmp_path / "absent", enough_gib=1, advice="").problem is None


def test_attention_kernels_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "cuda_problem", lambda index: NO_GPU)
    found = by_name(env.attention_findings())
    assert (found["sdpa math"].value, found["sdpa math"].problem) == ("works (fp32 on cpu)", None)
    assert found["sdpa efficient"].value == "for GPUs only"
    monkeypatch.setattr(attention, "sdpa_problem", lambda *_, dtype: "broken")
    found = by_name(env.attention_findings())
    assert (found["sdpa math"].problem, found["sdpa math"].essential) == ("broken", True)
    assert (found["sdpa flash"].problem, found["sdpa flash"].essential) == ("broken", False)


def test_encoders_that_this_ffmpeg_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "ENCODERS", ("mjpeg", "no264"))
    found = by_name(env.ffmpeg_findings())["encoders"]
    assert found.value == "mjpeg"
    assert "no264 missing" in str(found.problem)


@pytest.mark.gpu
def test_the_whole_report_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["decoder_auto"]["decoder"] == "dali"
    assert "GPU 0" in report["sections"]["PyTorch"]
    kernels = report["sections"]["attention"]
    assert kernels["sdpa flash"]["problem"] is None or kernels["sdpa efficient"]["problem"] is None
