"""Edits → shards: training examples, activations, residuals, and the two writers."""
