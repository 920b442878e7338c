"""Annotation files to manifests."""
