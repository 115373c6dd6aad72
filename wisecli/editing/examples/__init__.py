"""Edits → training examples: prompts in contexts and other words, and their tokens."""
