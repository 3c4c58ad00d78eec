"""Checkpoints: snapshots of a trial, written beside the training, and checked before a trial resumes from one."""
