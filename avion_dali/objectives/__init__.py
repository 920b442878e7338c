"""Batch to (loss, report)."""
