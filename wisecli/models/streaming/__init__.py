"""Models that do not fit in memory: layers read from files as they run."""
