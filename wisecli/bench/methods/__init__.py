"""Rivals of the paper, one file each, behind one small protocol (:mod:`wisecli.bench.methods.base`)."""

from __future__ import annotations

from importlib import import_module

from wisecli.bench.methods.base import METHODS

# Every file that puts methods into the table; to add one, write its file and name it here.
_MODULES = (
    "weights.alphaedit",
    "weights.crispedit",
    "adapters.defer",
    "weights.ft_ewc",
    "weights.ft_l",
    "adapters.grace",
    "context.icl",
    "context.knn",
    "adapters.lora",
    "adapters.lora_paraphrased",
    "weights.memit",
    "adapters.memoir",
    "weights.mend",
    "context.rag",
    "context.rag_hybrid",
    "context.rag_shots",
    "weights.rome",
    "context.serac",
    "weights.ultraedit",
)


def load_methods() -> None:
    """Fill the table of methods: import every file that has one, and what other packages bring.

    Raises:
        SettingsError: what another package brings cannot be loaded, or has the name of one that is here.
    """
    for name in _MODULES:
        import_module(f"{__name__}.{name}")
    METHODS.load_installed()
