"""Prompts as text and tokens: chat templates, forms, kinds, and rewriting by rule."""
