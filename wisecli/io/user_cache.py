"""The one folder in the user's cache that all files kept between runs are in."""

from pathlib import Path

from platformdirs import user_cache_path


def cache_path(kind: str) -> Path:
    """Return the folder of files of a kind, such as ``models``, ``layers`` or ``unrelated``."""
    return user_cache_path("wise") / kind
