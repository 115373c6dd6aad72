"""Rivals of the paper, one file each, behind one small protocol (:mod:`wisecli.bench.methods.base`)."""

from importlib import import_module

from wisecli.bench.methods.base import METHODS

# Every file that puts methods into the table; to add one, write its file and name it here.
_MODULES = {
    "adapters": "defer grace lora lora_paraphrased memoir",
    "context": "icl knn rag rag_hybrid rag_shots serac",
    "weights": "alphaedit crispedit ft_ewc ft_l memit mend rome ultraedit",
}


def load_methods() -> None:
    """Fill the table of methods: import every file that has one, and what other packages bring.

    Raises:
        SettingsError: what another package brings cannot be loaded, or has the name of one that is here.
    """
    for folder, names in _MODULES.items():
        for name in names.split():
            import_module(f"{__name__}.{folder}.{name}")
    METHODS.load_installed()
