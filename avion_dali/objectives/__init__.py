"""Training objectives: each maps a batch to a loss and a report."""
