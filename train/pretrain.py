"""Pre-train a video-text dual encoder (`contrastive`) or only a video encoder (`masked-video`).

python -m train.pretrain --config pretrain_tiny --data.train_manifest M --decoder cpu-fused
torchrun --nproc_per_node=8 -m train.pretrain --config pretrain_own --data.train_manifest M
"""

from avion_dali.cli.arguments import run_command
from avion_dali.cli.pretrain import main

if __name__ == "__main__":
    run_command(main)
