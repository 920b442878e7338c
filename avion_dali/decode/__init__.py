"""From a clip request to frames: packet planning and the CPU decoders."""
