"""Each part of the GPU suite, where a fake takes the GPU's place: what it notices, counts and refuses."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pynvml
import pytest
import torch
from PIL import Image

from avion_dali.decode import cpu_fused

pytest.importorskip("nvidia.dali")

from benchmarks.gpu import checks, chunks, correctness, device, loading, training
from benchmarks.gpu.correctness import everything_kept, mini_clips, planned
from benchmarks.gpu.device import sampling
from benchmarks.gpu.parts import TINY, NotRunError, Scale, Suite, attempt
from benchmarks.gpu.training import NO_LOADER, Fed
from benchmarks.machine import ROOT

STYLES = ("vp9", "vp9-odd", "balanced", "compat", "hevc")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A suite with small chunks of some styles."""
    media = tmp_path_factory.mktemp("media")
    for job in chunks.media_jobs(media, small=True):
        if job.path.parts[-3] in STYLES:
            chunks.encode(job)
    return Suite(tmp_path_factory.mktemp("work"), media, "cpu", TINY)


@pytest.fixture
def rows() -> list[dict]:
    return []


def failures(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "failure" in row]


def test_the_media_are_all_styles_and_an_odd_size(tmp_path):
    for small in (False, True):
        jobs = list(chunks.media_jobs(tmp_path, small=small))
        found = {job.path.parts[-3] for job in jobs}
        assert found == {*chunks.STYLES, "balanced-odd", "vp9-odd"}
        assert {job.size[0] % 16 == 0 for job in jobs if "odd" in str(job.path.relative_to(tmp_path))} == {
            False
        }
        assert len(jobs) == len(found) + (0 if small else 3)


def test_frames_of_dali_are_right_and_other_styles_say_why_not(suite, rows):
    correctness.frames(suite, rows.append)
    assert [row["chunks"] for row in rows][:2] == ["vp9", "vp9-odd"] and len(rows) == len(chunks.STYLES) + 2
    for row in rows:
        if row["chunks"].startswith("vp9"):
            assert row["right"] and row["clips"] == TINY.checked and row["min_psnr_db"] > 45
            assert row["clips_with_wrong_numbers"] == row["failures"] == []
        elif row["chunks"] in STYLES:
            assert "does not decode" in row["not_run"]
        else:
            assert "make them with --make-media" in row["not_run"]


def test_loaders_are_timed(suite, rows):
    usual = suite.scale.graphs[-1]
    cases = [("dali", "vp9", 1, usual), ("dali", "compat", 1, usual), ("cpu-fused", "compat", 1, None)]
    loading.record_rates(suite, rows.append, cases)
    by_dali, refused, by_cpu = rows
    assert by_dali["clips_per_s"] > 0 and by_dali["left_to_cpu_fused"] == 0 and by_dali["graphs"] == 1
    assert by_cpu["clips_per_s"] > 0 and by_cpu["workers"] == 1
    assert "h264 chunks" in refused["not_run"]


def test_rates_are_those_of_all_cells(suite, monkeypatch):
    found = []
    monkeypatch.setattr(loading, "record_rates", lambda suite, record, cases: found.extend(cases))
    loading.throughput(replace(suite, scale=Scale()), found.append)
    loading.loaders(replace(suite, scale=Scale(workers=(16, 8, 1))), found.append)
    assert found[0] == ("dali", "vp9", 0, Scale().graphs[-1]) and len(found) == len(set(found))
    assert {graphs for _, chunks, _, graphs in found if chunks == "vp9" and graphs} >= set(Scale().graphs)
    assert [workers for name, chunks, workers, _ in found if name == "cpu-fused"] == [16, 8, 1, 0]


def test_trainings_are_fed_by_each_decoder_and_by_none(suite, rows):
    graphs = suite.scale.graphs[-1]
    fed = [Fed(NO_LOADER), Fed("dali", graphs, long=True), Fed("cpu-fused", encoder="videomae"), Fed("unknown")]
    training.record_trainings(suite, rows.append, fed)
    assert not failures(rows) and "not a decoder" in rows.pop()["not_run"]
    for row, steps in zip(rows, (TINY.steps, TINY.long_steps, TINY.steps), strict=True):
        assert (row["batch"], row["model"], row["steps"]) == (TINY.batch, "tiny", steps)
        assert row["clips_per_s"] > 0
    assert rows[1]["hours_for_20m_clips"] == pytest.approx(20e6 / rows[1]["clips_per_s"] / 3600, abs=0.01)
    assert (rows[1]["graphs"], rows[1]["threads"]) == (graphs.graphs, graphs.threads)


def test_table_4_is_made_of_the_carried_chunks(suite, rows, monkeypatch):
    taken = []

    def run_case(case, manifest, bench, *, batch, folder) -> dict:
        frames = manifest.chunk(0).ref.num_frames
        taken.append((case.crop, frames, batch, bench.size))
        return {"measured": "training", "clips_per_s": 1.0}

    monkeypatch.setattr(training.ablation, "run_case", run_case)
    training.table_4(suite, rows.append)
    assert [frames for _, frames, *_ in taken] == [9000, 450 // 60 * 60, 420, 420]
    assert [crop for crop, *_ in taken][-1] == "by DALI" and training.ablation.DECODERS["by DALI"] == "dali"
    assert {row["measured"] for row in rows} == {"table 4"} and len(rows) == 4


def test_tests_of_the_repository_are_counted_and_their_failures_told(suite, rows, monkeypatch):
    def run(options, plugins) -> None:
        assert options[options.index("-k") + 1] == "not compile" and options[-1].endswith("tests/test_gpu.py")
        error = "    assert 1 == 2\nE   assert 1 == 2\nE   more"
        for name, when, outcome, text in (
            *(("a", when, "passed", "") for when in ("setup", "call", "teardown")),
            ("b", "setup", "skipped", ""),
            ("c", "call", "failed", error),
        ):
            report = SimpleNamespace(nodeid=name, when=when, outcome=outcome, longreprtext=text)
            plugins[0].pytest_runtest_logreport(report)

    monkeypatch.setattr(pytest, "main", run)
    checks.run_tests(suite, rows.append, ("test_gpu",), "not compile")
    assert rows == [
        {"measured": "test", "test": "c", "failure": "E   assert 1 == 2"},
        {"measured": "tests", "file": "test_gpu", "passed": 1, "skipped": 1, "failed": 1},
    ]


def test_the_tests_that_are_named_are_there_and_marked():
    text = {name: (ROOT / "tests" / f"{name}.py").read_text() for name in named_tests()}
    assert all("mark.gpu" in found for found in text.values()) and len(text) == 9


def named_tests() -> set[str]:
    named: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "run_tests", lambda suite, record, files, chosen="": named.update(files))
        for part in (checks.tests_of_models, checks.tests_of_compilation, checks.tests_of_dali):
            part(None, None)
    return named


def test_what_is_measured_apart_says_why_it_was_not(capsys):
    def broken() -> dict:
        raise RuntimeError("first\nsecond")

    def unable() -> dict:
        raise NotRunError("no")

    assert attempt(lambda: {"a": 1}) == {"a": 1}
    assert attempt(unable) == {"not_run": "no"}
    assert attempt(broken) == {"failure": "RuntimeError: first"}
    assert "in broken" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "side"), [((512, 288), 224), ((382, 288), 224), ((128, 96), 64)])
def test_numbers_are_read_from_whole_pictures(size, side):
    rng = np.random.default_rng(0)
    for number in [0, 1, 299, 1023, *rng.integers(1024, size=20).tolist()]:
        picture = rng.integers(60, 200, (size[1], size[0], 3), dtype=np.uint8)
        chunks.draw_number(picture, number)
        scaled = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
        assert chunks.read_number(picture) == chunks.read_number(scaled) == number
    assert chunks.read_number(np.full((side, side, 3), 128, np.uint8)) == -1


def checked(suite: Suite, style: str) -> list:
    found = chunks.chunks_of(chunks.open_manifest(suite, style))
    return chunks.clips_to_check(found, count=8, frame_size=64)


def test_clips_to_check_are_of_all_kinds_and_show_their_numbers(suite):
    clips = checked(suite, "balanced")
    assert {len(clip.parts) for clip in clips[::2]} == {1, 2} == {len(clip.parts) for clip in clips[1::2]}
    assert any(clip.parts[0].frame_ids[-1] == 59 and clip.parts[0].frame_ids[0] == 0 for clip in clips)
    for clip in clips:
        is_whole = (clip.windows[0].width, clip.windows[0].height) == (128, 96)
        assert is_whole == (clip.sample_id % 2 == 0)
        frames = np.empty(clip.frames_shape, np.uint8)
        cpu_fused.decode_clip(clip, frames)
        if is_whole:
            shown = [chunks.read_number(frame) for frame in frames[0]]
            assert shown == chunks.shown_numbers(clip)


def test_all_packets_kept_give_the_frames_of_the_planned_ones(suite):
    fewer = 0
    for clip in checked(suite, "balanced"):
        for part in clip.parts:
            kept, dropped = everything_kept(part), planned(part)
            assert kept.stream == dropped.stream
            all_packets = [payload for run in kept.runs for payload in run.payloads]
            few_packets = [payload for run in dropped.runs for payload in run.payloads]
            assert set(few_packets) <= set(all_packets)
            assert sum(len(run.wanted) for run in kept.runs) == len(part.frame_ids)
            fewer += len(all_packets) - len(few_packets)
    assert fewer > 100
    on_gpu = replace(suite, device="cuda")
    minis, count = mini_clips(on_gpu, checked(suite, "balanced"), everything_kept)
    assert len(minis) == 8 and count > 100
    with pytest.raises(NotRunError, match="left to cpu-fused: DALI does not decode h264"):
        mini_clips(suite, checked(suite, "balanced"), planned)


class FakeRunner:
    """Takes the frames of `cpu-fused` for those of DALI, and may spoil them."""

    def __init__(self, clips: list, spoil) -> None:
        self.clips, self.spoil, self.queued = {clip.sample_id: clip for clip in clips}, spoil, []

    def put(self, inputs) -> None:
        self.queued.append([int(sample_id) for sample_id in inputs[-1]])

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.queued.pop(0)
        batch = np.empty((len(ids), *self.clips[ids[0]].frames_shape), np.uint8)
        for row, sample_id in enumerate(ids):
            cpu_fused.decode_clip(self.clips[sample_id], batch[row])
        return torch.from_numpy(self.spoil(batch, ids)), torch.tensor(ids)


def refuse_one(batch, ids):
    if 5 in ids:
        raise RuntimeError("Critical error\nError in stage encountered:\nno such frame\nmore")
    return batch


def brighter(batch, ids):
    return np.where(batch < 254, batch + 2, batch).astype(np.uint8)


@pytest.mark.parametrize(
    ("spoil", "right", "wrong", "failures"),
    [
        (lambda batch, ids: batch, True, [], []),
        (lambda batch, ids: batch[:, :, ::-1].copy(), False, [0, 2, 4, 6], []),
        (lambda batch, ids: np.roll(batch, 1, axis=0), False, [0, 2, 4, 6], []),
        (brighter, False, [], []),
        (refuse_one, False, [4, 6], ["no such frame"]),
    ],
    ids=["right", "order", "clips", "brighter", "error"],
)
def test_wrong_frames_are_noticed(suite, spoil, right, wrong, failures):
    runner, on_gpu = FakeRunner(checked(suite, "balanced"), spoil), replace(suite, device="cuda")
    row = correctness.check(on_gpu, runner, "balanced", planned)
    assert row["right"] is right
    assert set(row["clips_with_wrong_numbers"]) >= set(wrong) and row["failures"] == failures
    assert row["packets_per_clip"] > 4


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> object:
    """NVIDIA's management library with one GPU, by its identifier, which does not tell about its decoders."""

    def refuse(gpu) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    gpu = object()
    numbers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": {"GPU-12-34": gpu}.__getitem__,
        "nvmlDeviceGetDecoderUtilization": refuse,
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=97),
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=5_000_000_000),
        "nvmlDeviceGetClockInfo": lambda gpu, kind: 1500 + kind,
    }
    for name, function in numbers.items():
        monkeypatch.setattr(pynvml, name, function)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="12-34"))
    return gpu


def test_what_a_gpu_tells_is_read(one_gpu, monkeypatch):
    assert device.open_gpu() is one_gpu
    clocks = {"video_clock_mhz": 1500 + pynvml.NVML_CLOCK_VIDEO, "sm_clock_mhz": 1500 + pynvml.NVML_CLOCK_SM}
    told = {"kernels_percent": 97, "gpu_memory_mb": 5000.0, **clocks}
    assert device.read(one_gpu) == told
    monkeypatch.setattr(pynvml, "nvmlDeviceGetDecoderUtilization", lambda gpu: [81, 100_000])
    assert device.read(one_gpu) == told | {"nvdec_percent": 81}


def test_samples_are_summed_up_and_what_is_not_told_is_left_out(one_gpu):
    start = time.perf_counter()
    with sampling() as sampler:
        while not sampler.since(start):
            time.sleep(0.01)
        row = sampler.since(start)
    clocks = {"video_clock_mhz": 1503, "sm_clock_mhz": 1501}
    assert row == {"kernels_percent": 97, "gpu_memory_mb": 5000, **clocks}
    assert sampler.since(time.perf_counter()) == {}


def test_nothing_is_sampled_without_a_driver(monkeypatch):
    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    with sampling() as sampler:
        assert sampler.since(0) == {}


def test_a_training_takes_the_batch_that_fits(suite, monkeypatch):
    tried = []

    def train(suite, fed, batch, sampler) -> dict:
        tried.append(batch)
        if batch > limit:
            raise torch.OutOfMemoryError
        return {"clips_per_s": 1.0}

    limit = 1
    monkeypatch.setattr(training, "train", train)
    row = training.first_that_fits(suite, Fed(NO_LOADER), None)
    assert row == {"batch": 1, "clips_per_s": 1.0} and tried == [4, 2, 1]
    limit = 0
    with pytest.raises(NotRunError, match="does not fit"):
        training.first_that_fits(suite, Fed(NO_LOADER), None)


def test_a_gpu_that_is_asked_for_must_be_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    on_gpu = Suite(Path(), Path(), "cuda")
    with pytest.raises(NotRunError, match="driver|CUDA|GPU"):
        on_gpu.require_device()
    with pytest.raises(NotRunError, match="driver|CUDA|GPU|DALI"):
        on_gpu.require_dali()
    Suite(Path(), Path(), "cpu").require_device()
