"""Pre-train a video-text dual encoder (`contrastive`) or a video encoder alone (`masked-video`).

avion-dali pretrain --config pretrain_tiny --data.train_manifest M --decoder cpu-fused
torchrun --nproc_per_node=8 -m avion_dali pretrain --config pretrain_own --data.train_manifest M
"""

from avion_dali.cli.arguments import parameters_as_keys, parse_options
from avion_dali.contracts import UserError


def main(argv: list[str] | None = None) -> int:
    """Pre-train a model.

    Args:
        argv: arguments; None uses the arguments of the process.
    """
    return train_from_command_line(argv, command="pretrain", description=__doc__ or "")


def train_from_command_line(argv: list[str] | None, *, command: str, description: str) -> int:
    """Parse, build, run, close; for both subcommands that train.

    Args:
        argv: arguments; None uses the arguments of the process.
        command: name of the subcommand.
        description: its help.

    Raises:
        UserError: when the configuration names an objective of the other subcommand, or cannot be used.
    """
    from avion_dali.config import TrainConfig

    config = parse_options(TrainConfig, argv, prog=f"avion-dali {command}", description=description)
    # Decode workers import this module again: everything heavy is imported here.
    from avion_dali.assembly.blocking_sync import apply_blocking_sync
    from avion_dali.assembly.training import training
    from avion_dali.engine.distributed import distributed_session
    from avion_dali.engine.signals import exit_status
    from avion_dali.tasks.table import TASKS, find_task

    if (right := find_task(config.objective.name).command) != command:
        objectives = " and ".join(name for name, task in TASKS.items() if task.command == command)
        raise UserError(
            f"avion-dali {command} trains {objectives}; objective.name = {config.objective.name} is for "
            f"avion-dali {right}. Give --config a recipe of `avion-dali recipes`: it names an objective and "
            "what goes with it"
        )
    apply_blocking_sync(config.dali)
    keys = parameters_as_keys(TrainConfig)
    with keys, distributed_session() as distributed, training(config, distributed) as loop:
        if loop.step >= loop.last_step:
            print(
                f"{config.output_dir} has completed all {loop.last_step} steps; raise optim.epochs to continue"
            )
        summary = loop.run()
    return exit_status(summary.stopped_by)
