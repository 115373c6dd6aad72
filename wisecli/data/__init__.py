"""Texts, facts and templates that come with the package."""
