"""The paper's analyses, one file each, behind one small protocol (:mod:`wisecli.bench.studies.base`)."""

from __future__ import annotations

import pkgutil
from importlib import import_module

_NO_STUDIES = ("protocol", "room", "drawing")


def load_studies() -> None:
    """Fill the table of studies: import every file here."""
    for module in pkgutil.iter_modules(__path__):
        if module.name not in _NO_STUDIES:
            import_module(f"{__name__}.{module.name}")
