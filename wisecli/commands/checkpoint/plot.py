"""The router's scores as pictures: those that a manifest keeps, and those of one prompt's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from wisecli.artifacts.memory_manifest import MemoryEntry, MemoryManifest
from wisecli.errors import SettingsError

_WIDTH, _HEIGHT = 7.0, 3.2
# Inches that a token takes.
_STEP = 0.3
# A picture of more could not be looked at.
_PANELS = 24

_UNITS = {"norm": "norm of the update", "late-interaction": "probability of the likeliest edit"}


@dataclass(frozen=True)
class Token:
    """A token of the prompt or the answer: the strongest memory's score there, as a multiple of its threshold.

    ``edit`` is the id of the edit whose key was nearest, in a lookup; ``routed`` whether it answered.
    """

    text: str
    strength: float
    routed: bool
    edit: str | None


def plot_scores(path: Path, manifest: MemoryManifest) -> None:
    """Draw the distributions of scores that a manifest keeps, a panel for each of the first memories, into a file.

    Raises:
        SettingsError: matplotlib is not installed, or cannot write such a file there.
    """
    figure_of = _figures()
    drawn = manifest.memories[:_PANELS]
    count = len(drawn)
    figure = figure_of(figsize=(_WIDTH, _HEIGHT * count), layout="constrained")
    panels = figure.subplots(count, 1, squeeze=False)[:, 0]
    for number, (panel, entry) in enumerate(zip(panels, drawn, strict=True)):
        _draw(panel, entry, f"memory {number} ({entry.kind}), edits: {len(entry.edits)}")
    _save(path, figure)


def plot_tokens(path: Path, prompt: Sequence[Token], answer: Sequence[Token]) -> None:
    """Draw the score at every token of a prompt and its answer, as a multiple of the threshold, into a file.

    Raises:
        SettingsError: matplotlib is not installed, or cannot write such a file there.
    """
    tokens = (*prompt, *answer)
    figure = _figures()(figsize=(max(_WIDTH, _STEP * len(tokens)), _HEIGHT), layout="constrained")
    panel = figure.subplots()
    places, split = range(len(tokens)), len(prompt)
    colours = ["tab:blue" if token.routed else "tab:gray" for token in tokens]
    panel.bar(places, [token.strength for token in tokens], color=colours)
    panel.axhline(1.0, color="tab:red", linestyle="--", label="threshold")
    panel.axvline(split - 0.5, color="black", linewidth=0.8, label="the answer begins")
    panel.set_xticks(places, [repr(token.text)[1:-1] for token in tokens], rotation=60, ha="right")
    panel.set(ylabel="score / threshold", title="blue: a side memory answers", xlim=(-0.6, len(tokens) - 0.4))
    panel.legend(loc="best")
    _save(path, figure)


def _figures() -> Any:
    """Return what makes a figure.

    Raises:
        SettingsError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise SettingsError("--plot needs matplotlib; install it with pip install 'wisecli[plot]'")
    from matplotlib.figure import Figure

    return Figure


def _save(path: Path, figure: Any) -> None:
    """Write a figure in the format that the path's ending names."""
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
    """Draw the cumulative shares of one memory's router scores into a panel."""
    sides = [(f"edits ({entry.misses:.1%} below)", entry.edit_scores, "tab:blue")]
    if entry.false_alarms is not None:
        sides.insert(0, (f"unrelated text ({entry.false_alarms:.2%} above)", entry.unrelated_scores, "tab:gray"))
    for name, scores, colour in sides:
        shares = sorted((float(share), score) for share, score in scores.items())
        panel.plot([score for _, score in shares], [share for share, _ in shares], label=name, color=colour, marker=".")
    panel.axvline(entry.threshold, color="tab:red", linestyle="--", label=f"threshold {entry.threshold:.4g}")
    unit = _UNITS[entry.router]
    panel.set(xlabel=f"router score ({unit})", ylabel="share at or below", ylim=(-0.02, 1.02), title=title)
    panel.legend(loc="best")
