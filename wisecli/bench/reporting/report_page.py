"""The one page of `wise bench`: the methods' table and every study, as far as the output has them."""

import json
from pathlib import Path
from typing import Any

from wisecli.bench.reporting.html_tables import page
from wisecli.bench.studies import load_studies
from wisecli.bench.studies.base import STUDIES, section
from wisecli.io.checkpoint import read_json

RESULTS = "results.json"


def study_file(output: Path, name: str) -> Path:
    """Return where the rows of a study that were asked for last are, with its settings."""
    return output / f"study-{name}.json"


def write_page(output: Path) -> None:
    """Write ``report.html`` from ``results.json`` and the ``study-….json`` that are there."""
    load_studies()
    results = output / RESULTS
    methods = read_json(results) if results.is_file() else None
    files = {name: study_file(output, name) for name in STUDIES}
    studies = {name: read_json(file) for name, file in files.items() if file.is_file()}
    sections = [section(STUDIES[name], content["rows"]) for name, content in studies.items()]
    found = {**({} if methods is None else {"methods": methods}), **studies}
    about = {name: {part: content[part] for part in ("config", "versions")} for name, content in found.items()}
    config = next(iter(about.values()))["config"]
    title = f"Editing {config['model']} with {config['dataset']}"
    rows = [] if methods is None else _rows(methods["results"])
    text = page(rows, title=title, about=json.dumps(about, indent=2), sections=sections)
    (output / "report.html").write_text(text, encoding="utf-8")


def _rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``results.<method>.<edits>`` as rows, those of few edits first."""
    rows = [
        {"method": method, "edits": int(count), "figures": figures}
        for method, by_count in results.items()
        for count, figures in by_count.items()
    ]
    return sorted(rows, key=lambda row: row["edits"])
