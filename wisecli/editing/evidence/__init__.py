"""The keys and residuals that a shard keeps, and further keys for tokens that behave unlike others."""
