"""Fine-tune a pre-trained model for retrieval (`max-margin`) or recognition (`classification`).

torchrun --nproc_per_node=8 -m avion_dali finetune --config finetune_own_recognition
    --model.weights FILE --data.train_manifest TRAIN --data.eval_manifest HELDOUT --output-dir runs/mine
"""

from avion_dali.cli.pretrain import train_from_command_line


def main(argv: list[str] | None = None) -> int:
    """Fine-tune a model.

    Args:
        argv: arguments; None uses the arguments of the process.
    """
    return train_from_command_line(argv, command="finetune", description=__doc__ or "")
