"""Rivals of the paper, one file each, behind one small protocol (:mod:`wisecli.bench.baselines.base`)."""

from __future__ import annotations

from importlib import import_module

# Every file that puts methods into the table; to add one, write its file and name it here.
_MODULES = (
    "alphaedit",
    "crispedit",
    "defer",
    "ft_ewc",
    "ft_l",
    "grace",
    "icl",
    "knn",
    "lora",
    "lora_paraphrased",
    "memit",
    "memoir",
    "mend",
    "rag",
    "rag_hybrid",
    "rag_shots",
    "rome",
    "serac",
    "ultraedit",
)


def load_methods() -> None:
    """Fill the table of methods: import every file that has one."""
    for name in _MODULES:
        import_module(f"{__name__}.{name}")
