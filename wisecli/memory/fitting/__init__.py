"""The router of a memory, fitted to its evidence."""
