"""The routed layer: a memory in the place of a value matrix, or behind a decoder layer."""
