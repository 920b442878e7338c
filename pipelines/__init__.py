"""The DALI way from clip requests to batches: mini clips, one plain DALI graph."""
