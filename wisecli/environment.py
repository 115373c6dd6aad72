"""What every report carries: the versions that made it, and the memory it took; and what the processor can do."""

import ctypes
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("wisecli", "torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of the packages that figures depend on."""
    return {name: _version(name) for name in _PACKAGES}


@cache
def _version(name: str) -> str:
    """Return a package's version; reading it takes milliseconds, and no process sees it change."""
    return version(name)


def changed_versions(before: Mapping[str, str]) -> list[str]:
    """Return the packages that have another version than they had, each as a phrase."""
    now = versions()
    return [
        f"{name} was {then}, now {now.get(name, 'missing')}" for name, then in before.items() if now.get(name) != then
    ]


def forget_peaks() -> None:
    """Reset the peaks of GPU memory, and of the process's own memory where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    import torch  # takes seconds, which `--help` and completion need not wait

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_vram_bytes() -> int:
    """Return the most memory of a GPU that the process has held; 0 without one."""
    torch = sys.modules.get("torch")  # without it none was
    if torch is None:
        return 0
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def peak_rss_bytes() -> int:
    """Return the most memory the process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give the system back what was freed between blocks that are still held, where the C library can (glibc).

    Large blocks that are taken and freed again and again, between small ones that stay, leave more and more such gaps.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def has_quick_int8() -> bool:
    """Return whether this machine's processor multiplies whole numbers of a byte faster than float32, by oneDNN."""
    import torch

    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return vectors and torch.backends.mkldnn.is_available()


def has_quick_bfloat16() -> bool:
    """Return whether this machine's processor multiplies bfloat16 numbers faster than float32: by AMX or AVX-512."""
    import torch

    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # before torch 2.10 nobody says
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
