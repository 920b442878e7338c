"""The one training loop and everything around it."""
