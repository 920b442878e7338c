"""Retrieval and classification metrics in numpy."""
