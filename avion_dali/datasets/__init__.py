"""Builds manifests from annotation files."""
