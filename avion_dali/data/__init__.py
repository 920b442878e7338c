"""Data side, pure: manifests, sampling, crops, order, planning, and making chunks."""
