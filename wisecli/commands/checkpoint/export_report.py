"""What ``wise export`` wrote."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportReport:
    """What ``wise export`` wrote: ``edits`` and, counted apart, ``consequences`` that follow from them.

    ``locality`` is measured for merged checkpoints: the share of unrelated tokens after which the next token's arg-max
    stays the base model's; ``tokens`` is how many were looked at. Routed checkpoints cost what ``wise eval`` says.
    ``gate`` is what was measured of a memory that became neurons.
    ``pushed`` is where on the hub it went. ``up_to_date`` says that the export was there already.
    """

    output: Path
    format: str
    edits: int
    bytes: int
    seconds: float
    peak_rss_bytes: int
    locality: float | None = None
    tokens: int = 0
    pushed: str | None = None
    planned: bool = False
    up_to_date: bool = False
    consequences: int = 0
    gate: dict[str, Any] | None = None
