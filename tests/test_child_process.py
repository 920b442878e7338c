"""Locks between processes that leave no names behind."""

import threading
from pathlib import Path

import pytest

from avion_dali.child_process import PipeLock, SafeSpawn
from avion_dali.loading.pool import WorkerPool

ROUNDS = 200


def count(lock: PipeLock, path: Path) -> None:
    for _ in range(ROUNDS):
        with lock, lock:
            path.write_text(str(int(path.read_text()) + 1))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    context, path = SafeSpawn(), tmp_path / "count"
    lock = context.RLock()
    path.write_text("0")
    processes = [context.Process(target=count, args=(lock, path)) for _ in range(2)]
    for process in processes:
        process.start()
    count(lock, path)
    for process in processes:
        process.join()
    assert path.read_text() == str(3 * ROUNDS)


def test_a_thread_takes_it_repeatedly_and_others_wait() -> None:
    lock, taken = PipeLock(), list[bool]()
    assert lock.acquire() and lock.acquire(block=False)
    lock.release()
    other = threading.Thread(
        target=lambda: taken.extend([lock.acquire(block=False), lock.acquire(timeout=0.05)])
    )
    other.start()
    other.join()
    assert taken == [False, False]
    lock.release()
    other = threading.Thread(target=lambda: taken.append(lock.acquire(timeout=5)))
    other.start()
    other.join()
    assert taken[-1]
    with pytest.raises(RuntimeError, match="does not hold"):
        lock.release()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_pools_have_no_semaphores_with_names() -> None:
    """After SIGKILL of a whole process group, nobody is left to remove them."""
    with WorkerPool(workers=1, timeout_s=60) as pool:
        maps = pool.schedule(Path.read_text, Path("/proc/self/maps")).result()
        maps += Path("/proc/self/maps").read_text()
    named = [line for line in maps.splitlines() if "/dev/shm/sem." in line and "(deleted)" not in line]
    assert named == []
