"""Rivals of the paper, one file each, behind one small protocol (:mod:`wisecli.bench.baselines.base`)."""

from __future__ import annotations

import pkgutil
from importlib import import_module

_NO_METHODS = ("protocol", "measure")


def load_methods() -> None:
    """Fill the table of methods: import every file here."""
    for module in pkgutil.iter_modules(__path__):
        if module.name not in _NO_METHODS:
            import_module(f"{__name__}.{module.name}")
