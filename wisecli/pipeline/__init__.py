"""The commands as functions: one public function each, a report returned, nothing printed.

Each is loaded when it is first asked for, so that looking into a manifest takes no model library.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wisecli.pipeline.bench import BenchReport, bench
    from wisecli.pipeline.edit import EditReport, edit
    from wisecli.pipeline.evaluate import EvalReport, evaluate
    from wisecli.pipeline.export import ExportReport, export
    from wisecli.pipeline.generate import Answer, generate
    from wisecli.pipeline.inspect import InspectReport, inspect
    from wisecli.pipeline.merge import MergeReport, merge
    from wisecli.pipeline.reproduce import reproduce
    from wisecli.pipeline.study import StudyReport, study
    from wisecli.pipeline.verify import VerifyReport, verify

__all__ = [
    "Answer",
    "BenchReport",
    "EditReport",
    "EvalReport",
    "ExportReport",
    "InspectReport",
    "MergeReport",
    "StudyReport",
    "VerifyReport",
    "bench",
    "edit",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "merge",
    "reproduce",
    "study",
    "verify",
]

# Each name's module; a command's own name is that of its module, too.
_HOMES = {name: name for name in __all__ if name.islower()}
_HOMES |= {"Answer": "generate", "EvalReport": "evaluate"}
_HOMES |= {
    f"{home.capitalize()}Report": home for home in ("bench", "edit", "export", "inspect", "merge", "study", "verify")
}


class _Commands(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule binds it here under its own name, which is to stand for the command.
        command = isinstance(value, ModuleType) and _HOMES.get(name) == name
        super().__setattr__(name, getattr(value, name) if command else value)


sys.modules[__name__].__class__ = _Commands
