"""What a memory costs at inference, as ratios to the base model (section 3.3: inference time).

Both take turns in one process, so that whatever else the machine does falls on both alike. The base is the same model
with its memory switched off, which leaves the plain product with the matrix.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from wisecli.bench.result_row import ResultRow
from wisecli.bench.studies.base import Figures, Point, study
from wisecli.bench.studies.plotting import MODES, by_edits, counted, line
from wisecli.bench.studies.study_context import StudyContext
from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.running.forward_pass import CACHE_ARGUMENT
from wisecli.models.running.generation import left_padded
from wisecli.routing.passes.token_cache import cache_returned

_ROWS, _ROUNDS = 8, 25

Step = Callable[[], Callable[[], object]]


@study("latency")
class Latency:
    """Seconds of a pass over whole prompts and of one more token, with a memory and without."""

    title = "Latency"
    caption = (
        f"One pass over whole prompts of edits (prefill), and one more token with a cache (decode), {_ROWS} rows at a "
        f"time: the median of {_ROUNDS} rounds' ratios to the base model, which takes turns with the memory."
    )
    columns = ("prefill_ratio", "decode_ratio", "prefill_milliseconds", "decode_milliseconds")

    def points(self, context: StudyContext) -> list[Point]:
        """Return every way to keep edits, for every number of them, here."""
        here = {"device": context.device, "threads": torch.get_num_threads()}
        return [
            {"edits": count, "shards": context.several(count), "mode": mode, **here}
            for count in context.counts
            for mode in MODES
        ]

    def measure(self, context: StudyContext, point: Point) -> Figures:
        """Return median times in milliseconds with and without the memory, and median ratios of the two."""
        shards = context.shards(point["edits"], shards=point["shards"], mode=point["mode"])
        edited = context.attached(context.memory(shards, mode=point["mode"]))
        prompts = [edit.prompt for edit in context.tested[: point["edits"]]][:_ROWS]
        figures: Figures = {}
        for name, step in steps(edited, prompts).items():
            taken, base = taking_turns(edited, step)
            figures[f"{name}_ratio"] = median(own / other for own, other in zip(taken, base, strict=True))
            figures[f"{name}_milliseconds"] = 1e3 * median(taken)
            figures[f"{name}_base_milliseconds"] = 1e3 * median(base)
        return figures

    def draw(self, figure: Any, rows: Sequence[ResultRow]) -> None:
        """Draw a panel for each way to run, a line for each way to keep edits."""
        figure.set_size_inches(9, 3.8)
        counts = list(by_edits(rows))
        for panel, name in zip(figure.subplots(1, 2, sharey=True), ("prefill", "decode"), strict=True):
            panel.axhline(1, color="tab:gray", linestyle="--", label="base model")
            for mode, style in MODES.items():
                own = [row for row in rows if row["mode"] == mode]
                line(panel, own, "edits", f"{name}_ratio", label=mode, **style)
            panel.set(title=name, ylabel="time, × base")
            counted(panel, counts)
            panel.legend(fontsize=8)


@torch.no_grad()
def steps(edited: EditedModel, prompts: Sequence[str]) -> dict[str, Step]:
    """Return functions that prepare a measurement and return what is timed."""
    ids, mask = (
        part.to(edited.model.device) for part in left_padded([edited.tokenizer(p)["input_ids"] for p in prompts])
    )
    longer = torch.cat([mask, mask[:, -1:]], 1)
    cache = cache_returned(edited.model(ids, attention_mask=mask, use_cache=True))

    def prefill() -> Callable[[], object]:
        return lambda: edited.model(ids, attention_mask=mask, use_cache=False)

    def decode() -> Callable[[], object]:
        own = copy.deepcopy(cache)  # the pass adds its token to it
        return lambda: edited.model(ids[:, -1:], attention_mask=longer, use_cache=True, **{CACHE_ARGUMENT: own})

    return {"prefill": prefill, "decode": decode}


@torch.no_grad()
def taking_turns(edited: EditedModel, step: Step) -> tuple[list[float], list[float]]:
    """Return the seconds of every round, with the memory and without; the first round only warms up and is left out."""
    taken: tuple[list[float], list[float]] = [], []
    for number in range(_ROUNDS + 1):
        for own, unedited in zip(taken, (False, True), strict=True):
            run = step()
            with edited.unedited() if unedited else nullcontext():
                spent = _seconds(run, edited.model.device)
            if number:
                own.append(spent)
    return taken


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run, the device's queue emptied before and after."""
    synchronize: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    begun = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begun
