"""Inspection before a training starts: finds bad chunks, and predicts the clips per second of a machine."""
