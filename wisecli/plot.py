"""The router's scores as a picture: how much of the edits and of unrelated text lies where, and the threshold."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from wisecli.errors import SettingsError
from wisecli.manifest import MemoryEntry, MemoryManifest

_WIDTH, _HEIGHT = 7.0, 3.2
# A picture of more could not be looked at.
_PANELS = 24


def plot_scores(path: Path, manifest: MemoryManifest) -> None:
    """Draw the distributions of scores that a manifest keeps, a panel for each of the first memories, into a file.

    Raises:
        SettingsError: matplotlib is not installed, or cannot write such a file there.
    """
    if find_spec("matplotlib") is None:
        raise SettingsError("--plot needs matplotlib; install it with pip install 'wisecli[plot]'")
    from matplotlib.figure import Figure

    drawn = manifest.memories[:_PANELS]
    count = len(drawn)
    figure = Figure(figsize=(_WIDTH, _HEIGHT * count), layout="constrained")
    panels = figure.subplots(count, 1, squeeze=False)[:, 0]
    for number, (panel, entry) in enumerate(zip(panels, drawn, strict=True)):
        _draw(panel, entry, f"memory {number} ({entry.kind}), edits: {len(entry.edits)}")
    kind = path.suffix.removeprefix(".").lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise SettingsError(f"--plot {path}: no such kind of picture; name it .png, .svg or .pdf")
    picture = BytesIO()
    figure.savefig(picture, format=kind)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise SettingsError(f"--plot {path} cannot be written ({error.strerror}); name another place") from None


def _draw(panel: Any, entry: MemoryEntry, title: str) -> None:
    for name, scores, colour in (
        (f"unrelated text ({entry.false_alarms:.2%} above)", entry.unrelated_scores, "tab:gray"),
        (f"edits ({entry.misses:.1%} below)", entry.edit_scores, "tab:blue"),
    ):
        shares = sorted((float(share), score) for share, score in scores.items())
        panel.plot([score for _, score in shares], [share for share, _ in shares], label=name, color=colour, marker=".")
    panel.axvline(entry.threshold, color="tab:red", linestyle="--", label=f"threshold {entry.threshold:.4g}")
    unit = "norm of the update" if entry.router == "norm" else "whitened cosine with the nearest key"
    panel.set(xlabel=f"router score ({unit})", ylabel="share of tokens at or below", ylim=(-0.02, 1.02), title=title)
    panel.legend(loc="best")
