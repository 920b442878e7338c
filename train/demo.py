"""The whole workflow at small size: procedural videos, chunks, manifest, training, retrieval, report.

python -m train.demo --output-dir runs/demo
"""

from avion_dali.cli.arguments import run_command
from avion_dali.cli.demo import main

if __name__ == "__main__":
    run_command(main)
