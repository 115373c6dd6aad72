"""The commands as functions: one public function each, a report returned, nothing printed."""

from wisecli.pipeline.edit import EditReport, edit
from wisecli.pipeline.evaluate import EvalReport, evaluate
from wisecli.pipeline.export import ExportReport, export
from wisecli.pipeline.generate import Answer, generate
from wisecli.pipeline.merge import MergeReport, merge

__all__ = [
    "Answer",
    "EditReport",
    "EvalReport",
    "ExportReport",
    "MergeReport",
    "edit",
    "evaluate",
    "export",
    "generate",
    "merge",
]
