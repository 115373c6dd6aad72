"""Writers: what a shard's edits should add, written into a delta on the shard's mask."""
