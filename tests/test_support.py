"""What cannot be decoded must be named with its reason, and nothing that crashes or hangs may come through."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import pytest
import torch

from avion_dali.contracts import ClipRequest
from avion_dali.decode import cpu_fused
from pipelines import codecs, support

ROOT = Path(__file__).parents[1]
needs_dali = pytest.mark.skipif(support.dali_package() is None, reason="needs DALI")


def test_without_a_driver_the_answer_costs_no_import() -> None:
    code = (
        "import sys\nfrom pipelines import support\nsupport.driver_cuda_version = lambda: None\n"
        "print(support.nvdec_problem(0))\nprint(sorted({'torch', 'nvidia.dali', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    problem, loaded = done.stdout.splitlines()
    assert "libcuda.so.1" in problem or "DALI" in problem
    assert loaded == "[]"


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Everything NVDEC needs seems to be there: two GPUs, a new driver, DALI."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(support, "driver_cuda_version", lambda: (13, 0))
    monkeypatch.setattr(support, "dali_package", lambda: ("nvidia-dali-cuda130", "2.4.0"))
    return monkeypatch


def test_nothing_stands_in_the_way_on_a_gpu_machine(gpu_machine: pytest.MonkeyPatch) -> None:
    assert support.nvdec_obstacle(1) is None


def test_dali_must_be_there(gpu_machine: pytest.MonkeyPatch) -> None:
    gpu_machine.setattr(util, "find_spec", lambda name: None)
    assert "pip install nvidia-dali-cuda130" in str(support.nvdec_obstacle(0))
    gpu_machine.setattr(sys, "platform", "darwin")
    assert "Linux only" in str(support.nvdec_obstacle(0))
    assert "Linux only" in str(support.dali_problem())
    assert "Linux only" in str(support.dali_cpu_problem())


def test_the_gpu_must_be_there(gpu_machine: pytest.MonkeyPatch) -> None:
    assert "no GPU 2, PyTorch sees 2" in str(support.nvdec_obstacle(2))
    gpu_machine.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in str(support.nvdec_obstacle(0))
    gpu_machine.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in str(support.nvdec_obstacle(0))
    gpu_machine.setattr(torch.version, "cuda", None)
    assert "without CUDA" in str(support.nvdec_obstacle(0))


def test_the_driver_must_be_new_enough(gpu_machine: pytest.MonkeyPatch) -> None:
    gpu_machine.setattr(support, "driver_cuda_version", lambda: (12, 4))
    assert "CUDA 12.4, nvidia-dali-cuda130 needs 13" in str(support.nvdec_obstacle(0))
    gpu_machine.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA 12.4, PyTorch needs 13.0" in str(support.nvdec_obstacle(0))
    gpu_machine.setattr(torch.cuda, "is_available", lambda: True)
    gpu_machine.setattr(support, "dali_package", lambda: ("nvidia-dali-cuda120", "2.4.0"))
    assert support.nvdec_obstacle(0) is None


def test_the_video_library_must_be_there(gpu_machine: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(name)

    gpu_machine.setattr(ctypes, "CDLL", load)
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,video,utility" in str(support.nvdec_obstacle(0))
    assert set(support.codec_support(0).values()) == {support.nvdec_obstacle(0)}


def test_the_drivers_version_is_read_as_cuda_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        status = 0

        def cuDriverGetVersion(self, version) -> int:  # noqa: N802  (the driver's name)
            version._obj.value = 12040
            return self.status

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert support.driver_cuda_version() == (12, 4)
    monkeypatch.setattr(Driver, "status", 100)
    assert support.driver_cuda_version() is None


def test_a_broken_dali_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "nvidia" / "dali"
    package.mkdir(parents=True)
    (tmp_path / "nvidia" / "__init__.py").touch()
    (package / "__init__.py").write_text("raise ImportError('libdali.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    assert "cannot be imported: ImportError: libdali.so: cannot open" in str(support.dali_problem())
    assert "DALI cannot be imported: libdali.so: cannot open" in str(support.dali_cpu_problem())


@pytest.mark.parametrize("codec", support.CODECS)
def test_cpu_fused_decodes_the_tiny_clips(codec: str) -> None:
    assert support.decode_problem(codec, "cpu-fused") is None


def test_wrong_frames_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frame 3 of the clip in the place of frame 2 is off by one step in half of the pictures."""
    right = cpu_fused.decode_clip

    def decode(request: ClipRequest, frames) -> None:
        right(request, frames)
        frames[:, 0] = frames[:, 1] - 2 * 20

    monkeypatch.setattr(cpu_fused, "decode_clip", decode)
    assert "differ by 1" in str(support.decode_problem("h264", "cpu-fused"))


def test_without_its_encoder_a_codec_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support._ENCODINGS, "h264", support._Encoding("no264", "mp4", "yuv420p", {}))
    assert "PyAV cannot encode it (no264" in str(support.decode_problem("h264", "cpu-fused"))


@needs_dali
@pytest.mark.parametrize("codec", ["vp9", "mjpeg"])
def test_dali_decodes_on_the_cpu(codec: str) -> None:
    assert support.decode_problem(codec, "dali-cpu") is None


@needs_dali
def test_what_dali_cannot_decode_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert support.decode_problem("h264", "dali-cpu") == "DALI does not decode h264 without a GPU"
    assert support.decode_problem("mjpeg", "nvdec") == "DALI does not decode mjpeg on a GPU"
    monkeypatch.setattr(codecs, "require_decodable", lambda parts, device: None)
    assert "Failed to create video decoder" in str(support.decode_problem("h264", "dali-cpu"))


def test_the_package_works_under_another_name(tmp_path: Path) -> None:
    """Workers and fresh interpreters import its parts by whatever name it has."""
    (tmp_path / "renamed").symlink_to(ROOT / "pipelines")
    code = (
        "import sys\nfrom renamed import mini_clip_worker, support\n"
        "print(mini_clip_worker.collect_into.__module__)\n"
        "print(support._decode_in_subprocess('h264', 'cpu-fused'))\n"
        "assert not [name for name in sys.modules if name.startswith('pipelines')]"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("renamed.mini_clip_worker\nNone\n", "")


@needs_dali
def test_dali_is_tried_in_a_process_of_its_own() -> None:
    assert support.dali_cpu_problem() is None


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_failure_of_nvdec_itself_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "nvdec_obstacle", lambda device_index: None)
    problem = str(support.nvdec_problem(0))
    assert problem.startswith("test clip of h264: ")
    assert "CUDA is not available" in problem


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """Each test asks anew, and no other test gets what it was told."""
    support._decode_in_subprocess.cache_clear()
    yield
    support._decode_in_subprocess.cache_clear()


@pytest.mark.parametrize("problem", [None, "the driver crashed"])
def test_each_device_is_tried_once(problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the answer, and whoever asks."""
    asked = []
    monkeypatch.setattr(support, "nvdec_obstacle", lambda device_index: None)
    monkeypatch.setattr(
        support,
        "call_in_subprocess",
        lambda task, codec, backend, index: asked.append((codec, index)) or problem,
    )
    answers = [support.nvdec_problem(index) for index in (0, 1, 0, 1)]
    assert answers == [problem and f"test clip of h264: {problem}"] * 4
    assert support.codec_support(0)["h264"] == (answers[0] or "works")
    assert asked.count(("h264", 0)) == asked.count(("h264", 1)) == 1


def test_each_codec_fails_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(task, codec, backend, device_index):
        asked.append((task, codec, backend, device_index))
        return "the driver crashed" if codec == "hevc" else None

    monkeypatch.setattr(support, "nvdec_obstacle", lambda device_index: None)
    monkeypatch.setattr(support, "call_in_subprocess", answer)
    found = support.codec_support(1)
    assert found == dict.fromkeys(support.CODECS, "works") | {"hevc": "test clip of hevc: the driver crashed"}
    assert sorted(asked, key=str) == sorted(
        [(support.decode_problem, codec, "nvdec", 1) for codec in support.CODECS], key=str
    )
    assert support.nvdec_problem(0) is None
    assert support.cpu_codec_support()["hevc"] == "test clip of hevc: the driver crashed"


def test_auto_takes_dali_where_nvdec_works() -> None:
    assert support.auto_decoder(None)[0] == "dali"
    assert support.auto_decoder("no GPU") == ("cpu-fused", "no GPU")


@needs_dali
def test_the_installed_dali_is_named() -> None:
    name, version = support.dali_package() or ("", "")
    assert metadata.version(name) == version


@pytest.mark.gpu
def test_nvdec_decodes_h264_and_hevc() -> None:
    assert support.nvdec_problem(0) is None
    found = support.codec_support(0)
    assert (found["h264"], found["hevc"]) == ("works", "works")
