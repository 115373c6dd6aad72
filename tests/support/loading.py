"""How tests load models."""

from __future__ import annotations

from wisecli.config import LoadOptions

CPU = LoadOptions(device="cpu")
