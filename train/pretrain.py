"""Pre-train a video-text dual encoder.

python -m train.pretrain --config configs/pretrain_tiny.yaml --data.train_manifest M --decoder cpu-fused
torchrun --nproc_per_node=8 -m train.pretrain --config ... --decoder cpu-fused
"""

from train.arguments import parse_options, run_command


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run, close.

    Args:
        argv: arguments; None takes the process's.
    """
    from avion_dali.config import TrainConfig

    config = parse_options(TrainConfig, argv, prog="python -m train.pretrain", description=__doc__ or "")
    # Decode workers re-import this module: everything heavy waits until here.
    from avion_dali.engine.distributed import distributed_session
    from train.build import pretraining

    with distributed_session() as distributed, pretraining(config, distributed) as loop:
        if loop.step >= loop.last_step:
            print(f"{config.output_dir} has all its {loop.last_step} steps; raise optim.epochs to train on")
        loop.run()
    return 0


if __name__ == "__main__":
    run_command(main)
