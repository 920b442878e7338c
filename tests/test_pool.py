"""The pool: any task, supervised; and a script that worker processes cannot import again."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from functools import partial
from pathlib import Path

import make_videos
import odd_tasks
import pytest
from dali_clips import chunk_manifest
from processes import left_after

from avion_dali.contracts import UserError
from avion_dali.loading import pool as pool_module
from avion_dali.loading.pool import WorkerDiedError, WorkerPool, default_workers

ROOT = Path(__file__).resolve().parents[1]


def test_it_does_any_task() -> None:
    with WorkerPool(workers=2, timeout_s=20) as pool:
        done = [pool.schedule(odd_tasks.joined, "a", number) for number in range(20)]
        assert [future.result() for future in done] == [f"'a' {number}" for number in range(20)]
        assert pool.schedule(partial(odd_tasks.joined, "b"), 3).result() == "'b' 3"


def test_processes_stand_back_as_told() -> None:
    with WorkerPool(workers=1, timeout_s=20, niceness=3) as pool:
        assert pool.schedule(os.nice, 0).result() == os.nice(0) + 3


def test_a_process_that_does_not_start_in_time_ends_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_START_S", 0.0)
    with (
        WorkerPool(workers=1, timeout_s=20) as pool,
        pytest.raises(UserError, match="did not start within 0 s"),
    ):
        pool.schedule(os.nice, 0).result(20)


def test_tasks_fail_alone(tmp_path: Path) -> None:
    with WorkerPool(workers=2, timeout_s=1.0) as pool:
        bad = [
            (pool.schedule(odd_tasks.fail, "broken"), ValueError),
            (pool.schedule(odd_tasks.read_past_the_end), EOFError),
            (pool.schedule(odd_tasks.die, int(signal.SIGKILL)), WorkerDiedError),
            (pool.schedule(odd_tasks.sleep_and_tell, str(tmp_path / "pid")), futures.TimeoutError),
        ]
        good = pool.schedule(odd_tasks.joined, "a", 1)
        for future, error in bad:
            with pytest.raises(error):
                future.result()
        assert good.result() == "'a' 1"


def test_a_late_tasks_process_is_gone_when_the_task_is_over(tmp_path: Path) -> None:
    with WorkerPool(workers=1, timeout_s=1.0) as pool:
        futures.wait([pool.schedule(odd_tasks.sleep_and_tell, str(tmp_path / "pid"))])
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def test_closing_twice_is_fine() -> None:
    pool = WorkerPool(workers=1, timeout_s=20)
    pool.schedule(odd_tasks.joined, "a", 1).result()
    pool.close()
    pool.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_pool_may_be_collected_in_its_own_thread() -> None:
    held = [WorkerPool(workers=1, timeout_s=20)]
    thread, ended = held[0]._supervisor._thread, threading.Event()
    answer = held[0].schedule(odd_tasks.go_on, 1)
    answer.add_done_callback(lambda _: (held.clear(), ended.set()))
    assert ended.wait(60)
    thread.join(20)
    assert not thread.is_alive()


def test_workers_are_the_ranks_share_of_the_cores() -> None:
    assert default_workers(1) >= default_workers(2) >= default_workers(10_000) == 1


POOL_SCRIPT = """
import odd_tasks
from avion_dali.loading.pool import WorkerPool

def main():
    with WorkerPool(workers=2, timeout_s=30) as pool:
        done = [pool.schedule(odd_tasks.joined, "clip", number) for number in range(3)]
        print(*(future.result() for future in done))
"""
LOADER_SCRIPT = """
import sys

def main():
    from dali_clips import loader_of, planner_of
    from avion_dali.data.manifest import Manifest
    from avion_dali.loading.pool import WorkerPool

    with (
        WorkerPool(workers=2, timeout_s=30) as pool,
        loader_of(planner_of(Manifest(sys.argv[1])), pool, decoder="cpu-fused") as loader,
    ):
        print(sum(len(batch) for batch in loader))
"""
SAID = {POOL_SCRIPT: "'clip' 0 'clip' 1 'clip' 2\n", LOADER_SCRIPT: "4\n"}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = make_videos.write_video(tmp_path / "a.mp4", frames=60)
    return chunk_manifest(tmp_path / "m", {path: (0.0, 0.1, 0.2, 0.3)}).folder


def run_script(folder: Path, source: str) -> subprocess.Popen:
    path = folder / "script.py"
    path.write_text(source)
    return subprocess.Popen(
        [sys.executable, str(path), str(folder / "m")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        start_new_session=True,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("source", [POOL_SCRIPT, LOADER_SCRIPT], ids=["pool", "loader"])
def test_a_script_without_a_main_guard_ends_with_one_error(manifest: Path, source: str) -> None:
    began = time.monotonic()
    script = run_script(manifest.parent, source + "main()\n")
    output, errors = script.communicate(timeout=100)
    # Importing torch alone takes several seconds on a busy machine, in the script and then in its workers.
    assert source == LOADER_SCRIPT or time.monotonic() - began < 15
    assert script.returncode == 1
    assert output == ""
    assert errors.splitlines()[-1].startswith(
        "avion_dali.contracts.UserError: worker processes import the main"
    )
    assert errors.count('if __name__ == "__main__":') == 1
    assert errors.count("Traceback") == 1
    assert len(errors.splitlines()) <= 30
    assert left_after(3, script.pid) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("source", [POOL_SCRIPT, LOADER_SCRIPT], ids=["pool", "loader"])
def test_a_script_with_a_main_guard_runs(manifest: Path, source: str) -> None:
    script = run_script(manifest.parent, source + 'if __name__ == "__main__":\n    main()\n')
    output, errors = script.communicate(timeout=100)
    assert (script.returncode, output, errors) == (0, SAID[source], "")
    assert left_after(3, script.pid) == []


def test_a_program_from_standard_input_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-"],
        input=POOL_SCRIPT + "main()\n",
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, SAID[POOL_SCRIPT], "")


def test_processes_that_keep_dying_end_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avion_dali.loading.pool._MAX_DEATHS", 1)
    monkeypatch.setattr("avion_dali.loading.pool._serve", odd_tasks.be_killed)
    with WorkerPool(workers=1, timeout_s=20) as pool:
        waiting = pool.schedule(odd_tasks.joined, "a", 1)
        with pytest.raises(UserError, match="died 2 times in a row; is the machine out of memory"):
            waiting.result()
        with pytest.raises(UserError, match="died 2 times in a row"):
            pool.schedule(odd_tasks.joined, "a", 2)


def test_workers_that_cannot_import_the_main_module_point_to_its_traceback(manifest: Path) -> None:
    broken = 'if __name__ != "__main__":\n    import module_that_is_not_there\n'
    script = run_script(manifest.parent, broken + POOL_SCRIPT + 'if __name__ == "__main__":\n    main()\n')
    output, errors = script.communicate(timeout=100)
    assert (script.returncode, output) == (1, "")
    assert "3 in a row with exit status 1: each imports the program's main module" in errors.splitlines()[-1]
    assert 3 <= errors.count("No module named 'module_that_is_not_there'") <= 4  # two workers start at a time


FORKING_SCRIPT = """
import multiprocessing, os, sys

def use(loader, batches):
    for step in (lambda: next(batches), lambda: next(iter(loader)), lambda: loader._pool.schedule(os.getpid)):
        try:
            step()
        except Exception as error:
            print(type(error).__name__, "belongs to the process that opened it" in str(error), flush=True)
    loader.close()

def main():
    from dali_clips import loader_of, planner_of
    from avion_dali.data.manifest import Manifest
    from avion_dali.loading.pool import WorkerPool

    with (
        WorkerPool(workers=2, timeout_s=30) as pool,
        loader_of(planner_of(Manifest(sys.argv[1])), pool, decoder="cpu-fused") as loader,
    ):
        batches = iter(loader)
        got = len(next(batches))
        workers = sorted(worker.process.pid for worker in pool._supervisor._workers)
        child = multiprocessing.get_context("fork").Process(target=use, args=(loader, batches))
        child.start()
        child.join()
        if os.fork() == 0:
            use(loader, batches)
            sys.exit(0)
        os.wait()
        print(got + sum(len(batch) for batch in batches))
        assert workers == sorted(worker.process.pid for worker in pool._supervisor._workers)

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process with threads")
def test_a_fork_is_told_that_the_loader_is_its_parents(manifest: Path) -> None:
    script = run_script(manifest.parent, FORKING_SCRIPT)
    output, errors = script.communicate(timeout=100)
    assert output == "UserError True\n" * 6 + "4\n"
    assert (script.returncode, errors) == (0, "")
    assert left_after(3, script.pid) == []


def test_tasks_that_make_progress_have_more_time() -> None:
    with WorkerPool(workers=1, timeout_s=0.6) as pool:
        assert pool.schedule(odd_tasks.go_on, 4).result() == 4


def test_answers_that_cannot_be_pickled_and_what_raised_an_error_are_told() -> None:
    with WorkerPool(workers=1, timeout_s=20) as pool:
        with pytest.raises(Exception, match="pickle"):
            pool.schedule(odd_tasks.unpicklable).result()
        error = pool.schedule(odd_tasks.fail, "broken").exception()
        assert "in fail" in str(error.__cause__)


def test_tasks_of_a_closed_pool_fail(tmp_path: Path) -> None:
    with WorkerPool(workers=1, timeout_s=20) as pool:
        waiting = pool.schedule(odd_tasks.sleep_and_tell, str(tmp_path / "pid"))
    with pytest.raises(RuntimeError, match="closed"):
        waiting.result()
    with pytest.raises(RuntimeError, match="closed"):
        pool.schedule(odd_tasks.joined, "a", 1)
