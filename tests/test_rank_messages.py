"""What ranks disagree on is told on every rank, and torchrun shows it at the end of its own traceback."""

import os
import subprocess
import sys
from pathlib import Path

from chunk_folders import write_random_manifest

from avion_dali.locks import folder_lock

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from avion_dali.cli.arguments import run_command
from avion_dali.data.manifest import Manifest
from avion_dali.engine.agreement import require_same_inputs, shared_folder_lock
from avion_dali.engine.distributed import init_distributed
from avion_dali.locks import folder_lock

def main():
    here = init_distributed(use_cuda=False)
    with shared_folder_lock(Path(sys.argv[1]) / "run", "training", distributed=here):
        manifest = Manifest(Path(sys.argv[1]) / str(here.rank))
        require_same_inputs(manifest)

run_command(main)
"""


def launch(tmp_path: Path) -> str:
    (tmp_path / "ranks.py").write_text(SCRIPT.format(root=str(Path(__file__).parents[1])))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "ranks.py"), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr


def test_ranks_of_other_data_are_told_so_at_the_end(tmp_path: Path) -> None:
    for rank, samples in enumerate((40, 50)):
        write_random_manifest(tmp_path / str(rank), num_samples=samples)
    said = launch(tmp_path)
    assert said.count("error: the ranks do not start from the same point: content of manifest 1 is") >= 2
    assert "content of manifest 1 is" in said[-1000:], said[-2000:]


def test_a_folder_that_is_held_ends_all_ranks_with_its_holder(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "run", "checking"):
        said = launch(tmp_path)
    assert f"by process {os.getpid()} on" in said[-1000:], said[-2000:]
