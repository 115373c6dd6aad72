"""Commands that write, read or run checkpoints and memories."""
