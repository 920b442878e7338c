"""Manifests, sampling, crops, order and planning of clips, and the creation of chunks."""
