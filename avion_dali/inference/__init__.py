"""Uses trained models: embeddings of clips."""
