"""Evaluate a checkpoint on a manifest: retrieval, recognition or reconstruction, depending on its task.

avion-dali evaluate --checkpoint runs/pretrain/checkpoint_best.pt --manifest M --output metrics.json
"""

import json
from pathlib import Path

from avion_dali.cli.arguments import parameters_as_keys, parse_options
from avion_dali.config import EvaluateConfig
from avion_dali.contracts import UserError
from avion_dali.files import atomic_write_text


def main(argv: list[str] | None = None) -> int:
    """Evaluate a checkpoint and print the metrics.

    Args:
        argv: arguments; None uses the arguments of the process.
    """
    config = parse_options(EvaluateConfig, argv, prog="avion-dali evaluate", description=__doc__ or "")
    # Decode workers import this module again, so slow imports are here.
    from avion_dali.assembly.blocking_sync import apply_blocking_sync
    from avion_dali.assembly.evaluators import evaluate_checkpoint
    from avion_dali.engine.distributed import distributed_session

    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise UserError(f"--output {config.output}: its folder does not exist")
    apply_blocking_sync(config.dali)
    with parameters_as_keys(EvaluateConfig), distributed_session() as distributed:
        result = evaluate_checkpoint(config, distributed)
        if distributed.is_main:
            text = json.dumps(result.metrics(), indent=2)
            print(text)
            if config.output:
                atomic_write_text(Path(config.output), text + "\n")
    return 0
