"""``wise edit`` and ``wise draft``: edits → shards, once or into a memory."""
