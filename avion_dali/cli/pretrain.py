"""Pre-train a video-text dual encoder (`contrastive`) or a video encoder alone (`masked-video`).

python -m train.pretrain --config configs/pretrain_tiny.yaml --data.train_manifest M --decoder cpu-fused
torchrun --nproc_per_node=8 -m train.pretrain --config ... --decoder cpu-fused
"""

from avion_dali.cli.arguments import parameters_as_keys, parse_options
from avion_dali.contracts import UserError


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run, close.

    Args:
        argv: arguments; None takes the process's.
    """
    return train_from_command_line(
        argv, prog="train.pretrain", description=__doc__ or "", objectives=("contrastive", "masked-video")
    )


def train_from_command_line(
    argv: list[str] | None, *, prog: str, description: str, objectives: tuple[str, ...]
) -> int:
    """Parse, build, run, close; for all entry points that train.

    Args:
        argv: arguments; None takes the process's.
        prog: name of the entry point.
        description: its help.
        objectives: what it trains.

    Raises:
        UserError: when the configuration names another objective, or cannot be used.
    """
    from avion_dali.config import TrainConfig

    config = parse_options(TrainConfig, argv, prog=f"python -m {prog}", description=description)
    if config.objective.name not in objectives:
        raise UserError(
            f"python -m {prog} trains {' and '.join(objectives)}; objective.name = {config.objective.name} is "
            f"for python -m train.{'pretrain' if prog.endswith('finetune') else 'finetune'}. Give --config, "
            "such as a file of configs/: it names an objective and what goes with it"
        )
    # Decode workers re-import this module: everything heavy waits until here.
    from avion_dali.assembly.training import training
    from avion_dali.engine.distributed import distributed_session
    from avion_dali.engine.signals import exit_status

    keys = parameters_as_keys(TrainConfig)
    with keys, distributed_session() as distributed, training(config, distributed) as loop:
        if loop.step >= loop.last_step:
            print(f"{config.output_dir} has all its {loop.last_step} steps; raise optim.epochs to train on")
        summary = loop.run()
    return exit_status(summary.stopped_by)
