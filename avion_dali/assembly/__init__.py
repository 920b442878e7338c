"""Builds loaders, trainings and evaluations from a configuration."""
