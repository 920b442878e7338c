"""The clip loader with its worker pool, shared memory and fault policy, and the strategy for CPU decoding."""
