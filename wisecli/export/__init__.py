"""Checkpoints for others: weights, the code that routes, the model card."""
