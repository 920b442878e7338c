"""The training loop and its parts: checkpoints, logs, distributed processes, precision, timing."""
