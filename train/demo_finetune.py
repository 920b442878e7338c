"""Fine-tuning at small size: retrieval, recognition and VideoMAE on the demo's videos, each with a control.

python -m train.demo_finetune --output-dir runs/demo_finetune
"""

from avion_dali.cli.arguments import run_command
from avion_dali.cli.demo_finetune import main

if __name__ == "__main__":
    run_command(main)
