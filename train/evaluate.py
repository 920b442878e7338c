"""Evaluate a checkpoint on a manifest by retrieval, recognition or reconstruction, depending on its objective.

python -m train.evaluate --checkpoint runs/pretrain/checkpoint_best.pt --manifest M --output metrics.json
"""

from avion_dali.cli.arguments import run_command
from avion_dali.cli.evaluate import main

if __name__ == "__main__":
    run_command(main)
