"""What can be known before a training starts: which chunks are bad, and what the machine will deliver."""
