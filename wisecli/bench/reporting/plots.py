"""What `wise bench` draws of its rows: answers, forgetting, and costs, each as SVG."""

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from wisecli.bench.result_row import ResultRow

# Three figures that are drawn, of which the first that all rows have are taken.
_DRAWN = (
    ("wild_as_taught", "wild_rephrased", "wild_locality"),
    ("as_taught", "rephrased", "unrelated_unchanged"),
    ("reliability", "generalization", "locality"),
)

# Costs that are drawn, by their titles, and how: those on a logarithmic scale may be thousands of times another's.
_COSTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    "seconds an edit": ("log", lambda figures: float(figures["seconds_per_edit"])),
    "MB beside the model": ("log", lambda figures: figures["bytes"] / 1e6),
    "peak MB": ("linear", lambda figures: peak_bytes(figures) / 1e6),
}


def peak_bytes(figures: Mapping[str, Any]) -> int:
    """Return the most memory held while a row was made, on the GPU if there was one."""
    return int(figures.get("peak_vram_bytes") or figures["peak_rss_bytes"])


def pictures(measured: Sequence[ResultRow]) -> list[str]:
    """Return pictures of the methods' figures, if there are any."""
    return [picture(draw, measured) for draw in (_quality, _ageing, _cost)] if measured else []


def picture(draw: Callable[[Any, Sequence[ResultRow]], None], rows: Sequence[ResultRow]) -> str:
    """Return a picture as SVG, to stand in the page itself; nothing where matplotlib is not installed."""
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


def _quality(figure: Any, rows: Sequence[ResultRow]) -> None:
    """Draw answers as taught and rephrased, and what stays; by the number of edits, if there are several."""
    drawn = next((names for names in _DRAWN if all(names[0] in row["figures"] for row in rows)), _DRAWN[-1])
    several = _has_course(rows)
    for axis, name in zip(figure.subplots(1, 3, sharey=True), drawn, strict=True):
        own = [row for row in rows if name in row["figures"]]
        _panel(
            axis, name.replace("_", " ").replace("wild", "WILD"), [row["figures"][name] for row in own], own, several
        )
        axis.set(**({"ylim": (-0.03, 1.03)} if several else {"xlim": (0, 1.03)}))
    if several:
        _legend(figure, axis)


def _has_course(rows: Sequence[ResultRow]) -> bool:
    """Return whether there are rows of several numbers of edits."""
    return len({row["edits"] for row in rows}) > 1


def _panel(axis: Any, title: str, values: Sequence[float], rows: Sequence[ResultRow], several: bool) -> None:
    """Draw one value of each row: lines by the number of edits if there are several, else bars."""
    (_as_lines if several else _as_bars)(axis, values, rows)
    axis.set(title=title, axisbelow=True)
    axis.grid(alpha=0.3)


def _as_lines(axis: Any, values: Sequence[float], rows: Sequence[ResultRow]) -> None:
    _dash_beyond_ten(axis)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [(row["edits"], value) for row, value in zip(rows, values, strict=True) if row["method"] == method]
        axis.plot(*zip(*sorted(own), strict=True), marker="o", label=method)
    axis.set(xscale="log", xlabel="edits")


def _as_bars(axis: Any, values: Sequence[float], rows: Sequence[ResultRow]) -> None:
    axis.barh([row["method"] for row in rows], values)
    axis.yaxis.set_inverted(True)


def _ageing(figure: Any, rows: Sequence[ResultRow]) -> None:
    """Draw how each tenth of the edits, the oldest first, is answered after all of them: as taught, or reliability."""
    axis, most = figure.subplots(), max(row["edits"] for row in rows)
    own = [row for row in rows if row["edits"] == most]
    size = max(1, most // 10)
    ages = [row["figures"]["by_age"] for row in own]
    parts = [[statistics.fmean(each[at : at + size]) for at in range(0, len(each), size)] for each in ages]
    longest = max(map(len, parts))
    shades = axis.pcolormesh(
        [[*part, *[math.nan] * (longest - len(part))] for part in parts], vmin=0, vmax=1, edgecolors="white"
    )
    measure = "WILD, as taught," if all("wild_as_taught" in row["figures"] for row in rows) else "reliability"
    axis.set(title=f"forgetting: {measure} after {most} edits", xlabel="edits up to, the oldest first")
    axis.set_xticks([index + 0.5 for index in range(longest)], [str(size * (index + 1)) for index in range(longest)])
    axis.set_yticks([index + 0.5 for index in range(len(own))], [row["method"] for row in own])
    axis.yaxis.set_inverted(True)
    # As lines, so that the page embeds no image.
    figure.colorbar(shades).solids.set(rasterized=False, edgecolor="face")


def _dash_beyond_ten(axis: Any) -> None:
    """Draw methods beyond the tenth, whose colours come again, dashed and with hollow marks."""
    from matplotlib import color_sequences
    from matplotlib.rcsetup import cycler

    axis.set_prop_cycle(
        cycler(linestyle=["-", "--"], fillstyle=["full", "none"]) * cycler(color=color_sequences["tab10"])
    )


def _legend(figure: Any, axis: Any) -> None:
    """Draw which method has which colour, beside the panels."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _cost(figure: Any, rows: Sequence[ResultRow]) -> None:
    """Draw what methods take in seconds and memory; if there are several, by number of edits."""
    several = _has_course(rows)
    for axis, (title, (scale, read)) in zip(figure.subplots(1, 3, sharey=not several), _COSTS.items(), strict=True):
        _panel(axis, title, [read(row["figures"]) for row in rows], rows, several)
        axis.set(**{"yscale" if several else "xscale": scale})
    if several:
        _legend(figure, axis)
