"""Write embeddings of videos or of a manifest's clips.

torchrun --nproc_per_node=8 -m train.features --checkpoint FILE --manifest M --output features.safetensors
"""

import sys

from avion_dali.cli.arguments import run_command
from avion_dali.cli.main import main

if __name__ == "__main__":
    run_command(lambda: main(["features", *sys.argv[1:]]))
