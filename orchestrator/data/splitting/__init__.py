"""Assign examples to splits: duplicates and groups together, near-duplicates, weighted sources, labels."""
