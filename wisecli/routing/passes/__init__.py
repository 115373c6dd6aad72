"""A model's passes with a memory in place: what is decided when, caches, generation."""
