"""Edits as people write them: records, files in any layout, and what is asked of them before training."""
