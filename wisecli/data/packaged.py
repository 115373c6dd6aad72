"""Files that come with the package, and the reader of TOML that this version of Python has."""

import sys
from functools import cache
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["packaged_table", "packaged_text", "tomllib"]


def packaged_text(name: str) -> str:
    """Return a file of ``wisecli/data``."""
    return resources.files("wisecli").joinpath("data", name).read_text(encoding="utf-8")


@cache
def packaged_table(name: str) -> dict[str, Any]:
    """Return a table (TOML) of ``wisecli/data``."""
    return tomllib.loads(packaged_text(name))
