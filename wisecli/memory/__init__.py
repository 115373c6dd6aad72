"""Shards → one memory: merging, the router's thresholds, removal, history."""
