"""Train large video models on one machine: chunked video, fused decoding, plain ViTs."""

__version__ = "0.1.0"
