"""Inference with trained models: embeddings of clips."""
