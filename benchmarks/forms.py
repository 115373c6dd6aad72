"""What an edited model answers in every form, and to questions beside its edits: the headline of `wise eval` alone.

    python benchmarks/forms.py memory zsre_3k.json --asked 40

For memories of thousands of edits, of which all else would take long. The records may be more than the memory holds;
other subjects are drawn from all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from wisecli.cli.commands.evaluate import tell_evaluation
from wisecli.cli.console import Console
from wisecli.commands.measure.evaluate import EvalReport, MemorySubject
from wisecli.config import EvalSettings, LoadOptions
from wisecli.edits.record import read_edits
from wisecli.environment import peak_rss_bytes
from wisecli.evaluation.edited_model import attach
from wisecli.evaluation.protocols import Generated, measure_generated
from wisecli.progress import ignore_progress

_LENGTH = 24


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", type=Path)
    parser.add_argument("records", type=Path, help="the file that the edits are from")
    parser.add_argument("--model")
    parser.add_argument("--asked", type=int, default=40, help="edits that are asked")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    edited = attach(arguments.memory, model=arguments.model, load=LoadOptions(device=arguments.device))
    edits = list(edited.manifest.edits)
    known = [*edits, *read_edits(arguments.records)]
    subject, what = MemorySubject(edited, EvalSettings(), ignore_progress), Generated("forms", "all", arguments.asked)
    found, _ = measure_generated(subject, what, edits, known, max_new_tokens=_LENGTH)
    samples = {"edits": len(edits), **found.samples}
    report = EvalReport(
        "edits", {}, found.before, samples, {}, time.perf_counter() - started, peak_rss_bytes(), asked=found.figures
    )
    tell_evaluation(Console(), report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.as_json(), indent=1))


if __name__ == "__main__":
    main()
