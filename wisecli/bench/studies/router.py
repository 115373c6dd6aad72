"""What the router sees: scores of edits, of their rephrases and of everything else, beside the threshold.

The paper's figure of routing activations (section 3.3): ‖Δ·a‖₂ of edits and of unrelated prompts, kept apart by the
margins of equation 5. Here at the last token of each prompt, for matrices that gradient steps or the closed form wrote
to those margins, and beside it what opens the edits of a lookup, which reads the whole prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch

from wisecli.bench.result_row import ResultRow
from wisecli.bench.studies.base import Figures, Point, study
from wisecli.bench.studies.plotting import by_edits
from wisecli.bench.studies.study_context import StudyContext
from wisecli.config import EditSettings, resolve
from wisecli.data.corpus import unrelated_texts
from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.prompts.tokenization import Row, collate, in_batches
from wisecli.routing.deciding.prompt_window import UNROUTED

_COLOURS = {"edits": "tab:blue", "rephrases": "tab:orange", "locality": "tab:green", "unrelated": "tab:gray"}
_UNITS = {
    "merge": "norm of the update, ‖Δa‖, over the threshold",
    "lookup": "probability of the likeliest edit, over the threshold",
}
_WRITTEN = (("gradient", "merge"), ("solve", "merge"), ("solve", "lookup"))
_TEXTS, _BINS = 200, 50


@study("router")
class Router:
    """Scores of edits, rephrases, locality prompts and unrelated texts, of each kind of memory."""

    title = "What the router sees"
    caption = (
        "Scores of prompts over the threshold, of one memory that holds all edits, and the share of each group that "
        "opens it; a prompt that does not name an edit's subject scores 0 with a lookup. Area: how often a rephrase "
        "scores higher than a locality prompt or an unrelated text, of which none was there when it was calibrated."
    )
    columns = ("threshold", *(f"{group}_above" for group in _COLOURS), "area")

    def points(self, context: StudyContext) -> list[Point]:
        """Return every writer with the memories it can serve, for every number of edits."""
        return [
            {"edits": count, "writer": writer, "mode": mode} for count in context.counts for writer, mode in _WRITTEN
        ]

    def measure(self, context: StudyContext, point: Point) -> Figures:
        """Return the threshold, all scores, and the share of each group that is above it."""
        shards = context.shards(point["edits"], writer=point["writer"], mode=point["mode"])
        edited = context.attached(context.memory(shards, mode=point["mode"]))
        figures: Figures = {"threshold": 1.0, "scores": {}}
        for group, prompts in prompts_of(context, point["edits"]).items():
            if prompts:
                figures["scores"][group], figures[f"{group}_above"] = scored(edited, prompts, context)
        scores = figures["scores"]
        if "rephrases" in scores:
            figures["area"] = area(scores["rephrases"], [*scores.get("locality", ()), *scores["unrelated"]])
        return figures

    def draw(self, figure: Any, rows: Sequence[ResultRow]) -> None:
        """Draw a histogram for each writer and router, a line of them for each number of edits."""
        grouped = by_edits(rows)
        widest = max(map(len, grouped.values()))
        figure.set_size_inches(4.4 * widest, 4.2 * len(grouped))
        panels = figure.subplots(len(grouped), widest, squeeze=False)
        for row, panel in zip((row for own in grouped.values() for row in own), panels.flat, strict=True):
            _histogram(panel, row)


def prompts_of(context: StudyContext, count: int) -> dict[str, list[str]]:
    """Return the groups of prompts; none of the unrelated texts has been seen by a writer or by the router."""
    edits, seed = context.tested[:count], context.settings.seed
    known = resolve(EditSettings, {}, section="edit").unrelated_texts
    seen = set(unrelated_texts(known, seed=seed))
    texts = [text for text in unrelated_texts(known + 4 * _TEXTS, seed=seed + 1) if text not in seen]
    return {
        "edits": [edit.prompt for edit in edits],
        "rephrases": [text for edit in edits for text in edit.rephrases],
        "locality": [probe.prompt for edit in edits for probe in edit.locality],
        "unrelated": list(dict.fromkeys(texts))[:_TEXTS],
    }


def scored(edited: EditedModel, prompts: Sequence[str], context: StudyContext) -> tuple[list[float], float]:
    """Return each prompt's strongest score as a share of its threshold, and the share of prompts that are opened."""
    rows = [Row(tuple(edited.tokenizer(prompt)["input_ids"]), ()) for prompt in prompts]
    strengths, opened = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
    for indices in in_batches(rows, context.settings.batch_size):
        decision = edited.decide(collate([rows[index] for index in indices]).to(edited.model.device))
        strengths[indices], opened[indices] = decision.score_ratio.cpu(), (decision.memory != UNROUTED).cpu()
    return strengths.tolist(), float(opened.float().mean())


def area(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Return the area under the ROC curve: how often one of the first scores is higher than one of the second."""
    first, second = torch.tensor(higher)[:, None], torch.tensor(lower)
    return float((first > second).float().mean() + (first == second).float().mean() / 2)


def _histogram(panel: Any, row: ResultRow) -> None:
    """Draw the router scores of each group of prompts, and the threshold, into a panel."""
    figures = row["figures"]
    everything = [score for scores in figures["scores"].values() for score in scores]
    low, high = min(everything), max(*everything, figures["threshold"])
    edges = [low + (high - low) * index / _BINS for index in range(_BINS + 1)]
    for group, scores in figures["scores"].items():
        label = f"{group} ({figures[f'{group}_above']:.1%} above)"
        share = [1 / len(scores)] * len(scores)
        panel.hist(scores, edges, weights=share, label=label, color=_COLOURS[group], alpha=0.25)
        panel.hist(scores, edges, weights=share, color=_COLOURS[group], histtype="step", linewidth=1.4)
    panel.axvline(figures["threshold"], color="tab:red", linestyle="--", label=f"threshold {figures['threshold']:.3g}")
    panel.set(title=f"{row['writer']}, {row['mode']}, {row['edits']} edits", xlabel=_UNITS[row["mode"]], ylabel="share")
    panel.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
