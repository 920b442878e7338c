"""Fine-tune a pre-trained model for retrieval (`max-margin`) or recognition (`classification`).

torchrun --nproc_per_node=8 -m train.finetune --config finetune_own_recognition
    --model.weights FILE --data.train_manifest TRAIN --data.eval_manifest HELDOUT --output-dir runs/mine
"""

from avion_dali.cli.arguments import run_command
from avion_dali.cli.finetune import main

if __name__ == "__main__":
    run_command(main)
