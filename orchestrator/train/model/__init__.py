"""The base as a trainable model: loading it, its attention, its objective, and how its blocks are computed."""
