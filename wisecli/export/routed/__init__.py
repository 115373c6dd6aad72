"""The ``routed`` and ``merged`` forms: transformers checkpoints with the memory beside or in their weights."""
