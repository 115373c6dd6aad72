"""Shards → one memory: evidence read as one, merge methods, and the memory that stores it."""
