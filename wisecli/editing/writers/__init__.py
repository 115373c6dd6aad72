"""Training examples → a shard's change: the closed form, and the paper's gradient steps."""
