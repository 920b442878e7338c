"""A training that writes down a digest of every batch, and can kill itself at a step.

python recorded_training.py RECORD KILL_STEP [options of train.pretrain]
"""

import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path


def main() -> None:
    from avion_dali.assembly.training import training
    from avion_dali.cli.arguments import parse_options
    from avion_dali.config import TrainConfig
    from avion_dali.contracts import ClipBatch
    from avion_dali.engine.distributed import distributed_session

    record, kill_step = Path(sys.argv[1]), int(sys.argv[2])
    config = parse_options(TrainConfig, sys.argv[3:], prog="recorded_training", description="")

    with distributed_session() as distributed, training(config, distributed) as loop:
        deliver = loop.loader.batches

        def batches(first_step: int, last_step: int) -> Iterator[ClipBatch]:
            for count, batch in enumerate(deliver(first_step, last_step)):
                step, micro = divmod(count, loop.loader.accum_steps)
                digest = hashlib.sha256(batch.frames_BTHWC.numpy().tobytes())
                digest.update(batch.tokens_BL.numpy().tobytes() + batch.sample_ids.tobytes())
                with record.open("a") as file:
                    file.write(f"{first_step + step}.{micro} {digest.hexdigest()}\n")
                if first_step + step == kill_step:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        loop.loader.batches = batches
        loop.run()


if __name__ == "__main__":
    main()
