"""Evaluate a checkpoint on a manifest: retrieval, recognition or reconstruction, as it was trained for.

python -m train.evaluate --checkpoint runs/pretrain/checkpoint_best.pt --manifest M --output metrics.json
"""

from avion_dali.cli.arguments import run_command
from avion_dali.cli.evaluate import main

if __name__ == "__main__":
    run_command(main)
