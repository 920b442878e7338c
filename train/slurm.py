"""Submit a training to SLURM with one process per GPU; it resumes after preemption and time limits.

python -m train.slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 -- pretrain --config pretrain_own ...
"""

from avion_dali.cli.arguments import run_command
from avion_dali.cli.slurm import main

if __name__ == "__main__":
    run_command(main)
