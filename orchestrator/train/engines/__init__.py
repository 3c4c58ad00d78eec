"""Engines: what computes gradients, clips them and updates the trainable tensors, with and without DeepSpeed."""
