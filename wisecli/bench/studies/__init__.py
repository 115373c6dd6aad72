"""The paper's analyses, one file each, behind one small protocol (:mod:`wisecli.bench.studies.base`)."""

from importlib import import_module

# Every file that puts a study into the table; to add one, write its file and name it here.
_MODULES = ("latency", "layers", "merge", "router", "scaling", "shards")


def load_studies() -> None:
    """Fill the table of studies: import every file that has one."""
    for name in _MODULES:
        import_module(f"{__name__}.{name}")
