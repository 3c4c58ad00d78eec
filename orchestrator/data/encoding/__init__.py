"""Encode examples as tokens and masks: an encoder for each task, the base's chat template, end tokens."""
