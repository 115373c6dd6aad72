"""Edits drafted from running text: passages, and the questions that they answer."""
