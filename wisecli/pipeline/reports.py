"""What every report carries: the versions that made it, and the memory it took."""

from __future__ import annotations

import resource
import sys
from importlib.metadata import version

_PACKAGES = ("wisecli", "torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on."""
    return {name: version(name) for name in _PACKAGES}


def peak_rss_bytes() -> int:
    """The most memory the process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
