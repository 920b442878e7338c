"""Puts the parts of the library together: configuration in, loader, training or evaluation out."""
