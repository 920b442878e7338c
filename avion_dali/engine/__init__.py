"""The training loop, and what it needs: checkpoints, logs, several processes, precision, timing."""
