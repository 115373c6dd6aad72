"""Commands that make, change or compare memories."""
