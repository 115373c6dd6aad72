"""The rows of `wise bench` as a Markdown table for a paper, and as one HTML page with its pictures inside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wisecli.bench.reporting.plots import peak_bytes, pictures
from wisecli.bench.result_row import ResultRow
from wisecli.data.packaged import packaged_text
from wisecli.edits.text import markdown_table

# Columns of the table as far as there are such figures: generated answers first.
_FIGURES = {
    "wild_as_taught": "WILD",
    "first_100": "WILD, first 100",
    "wild_rephrased": "WILD rephrased",
    "wild_rephrased_unique": "WILD rephrased, unique",
    "wild_locality": "WILD locality",
    "wild_portability": "WILD portability",
    "as_taught": "as taught",
    "as_taught_trained": "as taught, trained",
    "as_taught_unseen": "as taught *",
    "rephrased": "rephrased",
    "rephrased_trained": "rephrased, trained",
    "rephrased_unseen": "rephrased *",
    "unrelated_unchanged": "unrelated unchanged",
    "unrelated_unchanged_trained": "unrelated unchanged, trained",
    "unrelated_unchanged_unseen": "unrelated unchanged *",
    "portability_answered": "portability asked",
    "asked": "asked otherwise",
    "mentioned": "mentioned",
    "mentioned_unchanged": "mentioned, unchanged",
    "other_question": "other question",
    "other_subject": "other subject",
    "reliability": "reliability",
    "generalization": "generalization",
    "locality": "locality",
    "portability": "portability",
    "perplexity_median": "perplexity",
    "generated_exact": "exact",
}
# Columns that are left out where they repeat others in every row.
_REPEATING = {"first_100": "wild_as_taught", "wild_rephrased_unique": "wild_rephrased"}
_COSTS = ("s an edit", "overhead", "tokens", "MB", "peak MB")
# What columns are, below the table: those that some tables have, and what all have.
_OF_COLUMNS = {
    "wild_as_taught": "WILD: generated answers to the edits' prompts in the context of that protocol, to rephrases, "
    "and to unrelated prompts (locality: the same word for word).",
    "first_100": "The first 100: of these edits alone.",
    "wild_rephrased_unique": "Unique: of edits that no other record contradicts.",
    "as_taught": "Answers as taught, rephrased, to portability prompts, and to unrelated prompts (the same word for "
    "word) are generated: means over the forms that prompts are asked in, over those in which WISE learns, and with * "
    "over those in which WISE learns nothing. Other question, other subject: the share that gets an edit's answer; "
    "less is better.",
    "asked": "Asked otherwise: the share of prompts that ask an edit in ways that are no form (keywords, capitals, a "
    "pronoun) and get its answer. Mentioned: the share of those that only mention it (a task on the text, another "
    "time, a document) and get its answer; less is better. Unchanged: the share of these that are answered as before.",
}
_OF_ALL = (
    "Figures from reliability on are teacher-forced, except for exact. Overhead: how much longer a pass over prompts "
    "and answers takes; tokens: how many a prompt becomes longer; MB: what is kept beside the model; peak MB: the most "
    "memory held while the row was made, on the GPU if there is one."
)


@dataclass(frozen=True)
class Section:
    """A study as a part of the page: its table, and its picture as SVG or nothing."""

    title: str
    caption: str
    heads: Sequence[str]
    cells: Sequence[Sequence[str]]
    picture: str


def markdown(rows: Sequence[ResultRow]) -> str:
    """Return one table, a row each, and what its columns are."""
    found = markdown_table(heads(rows), [_cells(row, rows) for row in rows])
    return f"{found}\nMeans over edits, ± half of a 95 % bootstrap interval. {note(rows)}\n"


def columns(rows: Sequence[ResultRow]) -> dict[str, str]:
    """Return the heads, by name, of the figures that any row has and that say more than those before them."""
    figures = [row["figures"] for row in rows]
    shown = {name: head for name, head in _FIGURES.items() if any(name in own for own in figures)}
    repeated = {name for name, other in _REPEATING.items() if all(own.get(name) == own.get(other) for own in figures)}
    return {name: head for name, head in shown.items() if name not in repeated}


def heads(rows: Sequence[ResultRow]) -> tuple[str, ...]:
    """Return the heads of the whole table."""
    return ("edits", "method", *columns(rows).values(), *_COSTS)


def note(rows: Sequence[ResultRow]) -> str:
    """Return what the columns are."""
    shown = columns(rows)
    return " ".join([*(text for name, text in _OF_COLUMNS.items() if name in shown), _OF_ALL])


def page(rows: Sequence[ResultRow], *, title: str, about: str, sections: Sequence[Section] = ()) -> str:
    """Return a whole page: the methods' table if there are rows, pictures of it, and the studies.

    Args:
        about: how the rows came about, shown as it is.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(packaged_text("bench_report.html.j2")).render(
        title=title,
        about=about,
        heads=heads(rows),
        cells=[_cells(row, rows) for row in rows],
        note=note(rows),
        pictures=pictures([row for row in rows if "cannot" not in row["figures"]]),
        sections=sections,
    )


def _cells(row: ResultRow, rows: Sequence[ResultRow]) -> list[str]:
    """Return a row of the table of some rows."""
    figures, shown = row["figures"], columns(rows)
    cells = [str(row["edits"]), row["method"]]
    if "cannot" in figures:
        return [*cells, f"cannot run: {figures['cannot']}", *[""] * (len(shown) + len(_COSTS) - 1)]
    for name in shown:
        low, high = figures["intervals"].get(name, (0.0, 0.0))
        spread = f" ± {(high - low) / 2:.3f}" if high > low else ""
        cells.append(f"{figures[name]:.3f}{spread}" if name in figures else "")
    return [*cells, *costs(figures)]


def costs(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells on cost: seconds an edit, slower passes, longer prompts, what is kept and memory held in MB."""
    tokens = f"{figures['extra_tokens']:.0f}" if "extra_tokens" in figures else ""
    longer = round(figures["overhead"], 2) + 0.0  # zero has no minus
    times = f"{figures['seconds_per_edit']:.2f}", f"{longer:+.0%}"
    return *times, tokens, f"{figures['bytes'] / 1e6:.1f}", f"{peak_bytes(figures) / 1e6:.0f}"
