"""The rows of `wise bench` as a Markdown table for a paper, and as one HTML page with its pictures inside."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

FIGURES = {
    "reliability": "reliability",
    "generalization": "generalization",
    "locality": "locality",
    "portability": "portability",
    "perplexity_median": "perplexity",
    "generated_exact": "exact",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
small { color: #777; }
svg { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; }
"""

Row = dict[str, Any]


def markdown(rows: Sequence[Row]) -> str:
    """One table, a row each; intervals are half their width."""
    heads = ["edits", "method", *FIGURES.values(), "s an edit", "MB"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def page(rows: Sequence[Row], *, title: str, about: str) -> str:
    """A whole page: the table, and pictures of it.

    Args:
        about: how the rows came about, shown as it is.
    """
    heads = ["edits", "method", *FIGURES.values(), "s an edit", "MB"]
    table = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(row))}</tr>\n" for row in rows)
    measured = [row for row in rows if "cannot" not in row["figures"]]
    drawing = (_quality, _ageing, _cost) if measured and find_spec("matplotlib") else ()
    pictures = "\n".join(_picture(draw, measured) for draw in drawing)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body><h1>{html.escape(title)}</h1>
<table><thead><tr>{table}</tr></thead><tbody>
{body}</tbody></table>
<p><small>Means over edits, ± half of a 95 % bootstrap interval.</small></p>
{pictures}
<h2>How</h2><pre>{html.escape(about)}</pre>
</body></html>
"""


def _cells(row: Row) -> list[str]:
    figures = row["figures"]
    cells = [str(row["edits"]), row["method"]]
    if "cannot" in figures:
        return [*cells, f"cannot run: {figures['cannot']}", *[""] * (len(FIGURES) + 1)]
    for name in FIGURES:
        low, high = figures["intervals"].get(name, (0.0, 0.0))
        spread = f" ± {(high - low) / 2:.3f}" if high > low else ""
        cells.append(f"{figures[name]:.3f}{spread}" if name in figures else "")
    return [*cells, f"{figures['seconds_per_edit']:.2f}", f"{figures['bytes'] / 1e6:.1f}"]


def _picture(draw: Any, rows: Sequence[Row]) -> str:
    """A picture as SVG, to stand in the page itself."""
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
    """Reliability, generalization and locality against the number of edits."""
    axes = figure.subplots(1, 3, sharey=True)
    for axis, name in zip(axes, ("reliability", "generalization", "locality"), strict=True):
        for method in _methods(rows):
            own = [row for row in rows if row["method"] == method and name in row["figures"]]
            axis.plot([row["edits"] for row in own], [row["figures"][name] for row in own], marker="o", label=method)
        axis.set(title=name, xscale="log", xlabel="edits", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)


def _ageing(figure: Any, rows: Sequence[Row]) -> None:
    """Reliability of the edits in the order in which they came, after all of them, in tenths of the stream."""
    axis = figure.subplots()
    most = max(row["edits"] for row in rows)
    for row in (row for row in rows if row["edits"] == most):
        values = row["figures"]["by_age"]
        size = max(1, len(values) // 10)
        means = [sum(values[at : at + size]) / len(values[at : at + size]) for at in range(0, len(values), size)]
        axis.plot([size * (place + 1) for place in range(len(means))], means, marker="o", label=row["method"])
    axis.set(title=f"forgetting: reliability after {most} edits", xlabel="edit, oldest first", ylim=(-0.03, 1.03))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _cost(figure: Any, rows: Sequence[Row]) -> None:
    """Seconds an edit at the largest number of edits."""
    axis = figure.subplots()
    most = max(row["edits"] for row in rows)
    own = [row for row in rows if row["edits"] == most]
    axis.barh([row["method"] for row in own], [row["figures"]["seconds_per_edit"] for row in own])
    axis.set(title=f"seconds an edit, {most} edits", xscale="log")
    axis.grid(alpha=0.3, axis="x")
