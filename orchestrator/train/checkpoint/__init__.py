"""Checkpoints: snapshots of a trial, written in the background during training, and checked before a trial resumes from one."""
