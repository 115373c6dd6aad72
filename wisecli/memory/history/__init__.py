"""A memory's releases, its log, and which edits give way to new ones."""
