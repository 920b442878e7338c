"""Turns clip requests into frames: packet planning and the CPU decoders."""
