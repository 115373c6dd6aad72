"""The rows of `wise bench` as a Markdown table for a paper, and as one HTML page with its pictures inside."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from typing import Any

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
}
_OF_ALL = (
    "Figures from reliability on are teacher-forced, except for exact. Overhead: how much longer a pass over prompts "
    "and answers takes; tokens: how many a prompt becomes longer; MB: what is kept beside the model; peak MB: the most "
    "memory held while the row was made, on the GPU if there is one."
)
# Three figures that are drawn, of which the first that all rows have are taken.
_DRAWN = (
    ("wild_as_taught", "wild_rephrased", "wild_locality"),
    ("as_taught", "rephrased", "unrelated_unchanged"),
    ("reliability", "generalization", "locality"),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A study as a part of the page: its table, and its picture as SVG or nothing."""

    title: str
    caption: str
    heads: Sequence[str]
    cells: Sequence[Sequence[str]]
    picture: str


def markdown(rows: Sequence[Row]) -> str:
    """One table, a row each, and what its columns are."""
    found = table(heads(rows), [_cells(row, rows) for row in rows])
    return f"{found}\nMeans over edits, ± half of a 95 % bootstrap interval. {note(rows)}\n"


def columns(rows: Sequence[Row]) -> dict[str, str]:
    """Heads of the figures that any row has and that say more than those before them, by their names."""
    figures = [row["figures"] for row in rows]
    shown = {name: head for name, head in _FIGURES.items() if any(name in own for own in figures)}
    repeated = {name for name, other in _REPEATING.items() if all(own.get(name) == own.get(other) for own in figures)}
    return {name: head for name, head in shown.items() if name not in repeated}


def heads(rows: Sequence[Row]) -> tuple[str, ...]:
    """Heads of the whole table."""
    return ("edits", "method", *columns(rows).values(), *_COSTS)


def note(rows: Sequence[Row]) -> str:
    """What the columns are."""
    shown = columns(rows)
    return " ".join([*(text for name, text in _OF_COLUMNS.items() if name in shown), _OF_ALL])


def table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"


def page(rows: Sequence[Row], *, title: str, about: str, sections: Sequence[Section] = ()) -> str:
    """A whole page: the methods' table if there are rows, pictures of it, and the studies.

    Args:
        about: how the rows came about, shown as it is.
    """
    from jinja2 import Environment, StrictUndefined

    text = resources.files("wisecli").joinpath("data/bench_report.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(text).render(
        title=title,
        about=about,
        heads=heads(rows),
        cells=[_cells(row, rows) for row in rows],
        note=note(rows),
        pictures=_pictures([row for row in rows if "cannot" not in row["figures"]]),
        sections=sections,
    )


def _pictures(measured: Sequence[Row]) -> list[str]:
    """Pictures of the methods' figures, if there are any."""
    return [picture(draw, measured) for draw in (_quality, _ageing, _cost)] if measured else []


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """A row of the table of some rows."""
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
    """Cells: seconds an edit, how much longer a pass over prompts and answers takes and prompts become, what is kept,
    and the most memory held, both in MB.
    """
    peak = figures.get("peak_vram_bytes") or figures["peak_rss_bytes"]
    tokens = f"{figures['extra_tokens']:.0f}" if "extra_tokens" in figures else ""
    longer = round(figures["overhead"], 2) + 0.0  # nought has no minus
    times = f"{figures['seconds_per_edit']:.2f}", f"{longer:+.0%}"
    return *times, tokens, f"{figures['bytes'] / 1e6:.1f}", f"{peak / 1e6:.0f}"


def picture(draw: Callable[[Any, Sequence[Row]], None], rows: Sequence[Row]) -> str:
    """A picture as SVG, to stand in the page itself; nothing where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return ""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "wise", "font.size": 10}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        draw(figure, rows)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _quality(figure: Any, rows: Sequence[Row]) -> None:
    """Answers as taught and rephrased, and what stays, or their like; if there are several, by number of edits."""
    drawn = next((names for names in _DRAWN if all(names[0] in row["figures"] for row in rows)), _DRAWN[-1])
    draw = _as_lines if len({row["edits"] for row in rows}) > 1 else _as_bars
    for axis, name in zip(figure.subplots(1, 3, sharey=True), drawn, strict=True):
        draw(axis, name, [row for row in rows if name in row["figures"]])
        axis.set(title=name.replace("_", " ").replace("wild", "WILD"), axisbelow=True)
        axis.grid(alpha=0.3)
    if draw is _as_lines:
        _legend(figure, axis)


def _as_lines(axis: Any, name: str, rows: Sequence[Row]) -> None:
    _dash_beyond_ten(axis)
    for method in _methods(rows):
        own = [row for row in rows if row["method"] == method]
        axis.plot([row["edits"] for row in own], [row["figures"][name] for row in own], marker="o", label=method)
    axis.set(xscale="log", xlabel="edits", ylim=(-0.03, 1.03))


def _as_bars(axis: Any, name: str, rows: Sequence[Row]) -> None:
    axis.barh([row["method"] for row in rows], [row["figures"][name] for row in rows])
    axis.set(xlim=(0, 1.03))
    axis.yaxis.set_inverted(True)


def _ageing(figure: Any, rows: Sequence[Row]) -> None:
    """Answers as taught, or reliability, of each tenth of the edits, the oldest first, after all of them."""
    axis, most = figure.subplots(), max(row["edits"] for row in rows)
    own = [row for row in rows if row["edits"] == most]
    size = max(1, most // 10)
    parts = [_means_of(row["figures"]["by_age"], size) for row in own]
    longest = max(map(len, parts))
    shades = axis.pcolormesh(
        [[*part, *[math.nan] * (longest - len(part))] for part in parts], vmin=0, vmax=1, edgecolors="white"
    )
    told = "WILD, as taught," if all("wild_as_taught" in row["figures"] for row in rows) else "reliability"
    axis.set(title=f"forgetting: {told} after {most} edits", xlabel="edits up to, the oldest first")
    axis.set_xticks([place + 0.5 for place in range(longest)], [str(size * (place + 1)) for place in range(longest)])
    axis.set_yticks([place + 0.5 for place in range(len(own))], [row["method"] for row in own])
    axis.yaxis.set_inverted(True)
    # As lines, so that the page embeds no image.
    figure.colorbar(shades).solids.set(rasterized=False, edgecolor="face")


def _means_of(values: Sequence[float], size: int) -> list[float]:
    """The means of portions of so many values."""
    return [statistics.fmean(values[start : start + size]) for start in range(0, len(values), size)]


def _dash_beyond_ten(axis: Any) -> None:
    """Of more than ten methods colours come again, dashed and with hollow marks."""
    from matplotlib import color_sequences
    from matplotlib.rcsetup import cycler

    axis.set_prop_cycle(
        cycler(linestyle=["-", "--"], fillstyle=["full", "none"]) * cycler(color=color_sequences["tab10"])
    )


def _legend(figure: Any, axis: Any) -> None:
    """Which method has which colour, beside what is drawn."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _cost(figure: Any, rows: Sequence[Row]) -> None:
    """Seconds an edit at the largest number of edits."""
    axis = figure.subplots()
    most = max(row["edits"] for row in rows)
    own = [row for row in rows if row["edits"] == most]
    axis.barh([row["method"] for row in own], [row["figures"]["seconds_per_edit"] for row in own])
    axis.yaxis.set_inverted(True)
    axis.set(title=f"seconds an edit, {most} edits", xscale="log", axisbelow=True)
    axis.grid(alpha=0.3, axis="x")
