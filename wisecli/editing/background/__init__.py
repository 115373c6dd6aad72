"""The base model's activations on text that no edit may touch."""
