"""The supervised worker pool, its shared memory, its fault policy, and the CPU loader."""
