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
    from wisecli.pipeline.diff import DiffReport, diff
    from wisecli.pipeline.draft import DraftReport, draft
    from wisecli.pipeline.edit import EditReport, edit
    from wisecli.pipeline.evaluate import EvalReport, evaluate
    from wisecli.pipeline.explain import ExplainReport, explain
    from wisecli.pipeline.export import ExportReport, export
    from wisecli.pipeline.follow import follow
    from wisecli.pipeline.generate import Answer, generate
    from wisecli.pipeline.inspect import InspectReport, inspect
    from wisecli.pipeline.into import Batch, IntoReport, edit_into, merge_into
    from wisecli.pipeline.log import LogReport, log
    from wisecli.pipeline.merge import MergeReport, merge
    from wisecli.pipeline.remove import RemoveReport, remove
    from wisecli.pipeline.reproduce import reproduce
    from wisecli.pipeline.rollback import RollbackReport, rollback
    from wisecli.pipeline.study import StudyReport, study
    from wisecli.pipeline.verify import VerifyReport, verify

__all__ = [
    "Answer",
    "Batch",
    "BenchReport",
    "DiffReport",
    "DraftReport",
    "EditReport",
    "EvalReport",
    "ExplainReport",
    "ExportReport",
    "InspectReport",
    "IntoReport",
    "LogReport",
    "MergeReport",
    "RemoveReport",
    "RollbackReport",
    "StudyReport",
    "VerifyReport",
    "bench",
    "diff",
    "draft",
    "edit",
    "edit_into",
    "evaluate",
    "explain",
    "export",
    "follow",
    "generate",
    "inspect",
    "log",
    "merge",
    "merge_into",
    "remove",
    "reproduce",
    "rollback",
    "study",
    "verify",
]

# Each name's module; a command's own name is that of its module, too.
_HOMES = {name: name for name in __all__ if name.islower()}
_HOMES |= {"Answer": "generate", "EvalReport": "evaluate"}
_HOMES |= {"Batch": "into", "edit_into": "into", "merge_into": "into"}
_HOMES |= {
    name: name.removesuffix("Report").lower() for name in __all__ if name.endswith("Report") and name not in _HOMES
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
