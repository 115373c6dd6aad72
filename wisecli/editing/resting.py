"""Tokens that a model rests its attention on: their states are several times as long as others, their keys short.

A token that says nothing may become one, as the lone space that tokenizers put between a question and a number does
behind some short questions. The layers above see a state by its direction, so that a residual turns a long state less:
there it is stretched by as much as the state is longer. And as an edit's own prompts may leave the space what it
usually is where a rephrase does not, such an edit gets keys of that kind besides.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import RESTING, Evidence
from wisecli.data.corpus import made_up_subjects, relations
from wisecli.editing.prompt_variants import AnswerKey
from wisecli.editing.task import Task
from wisecli.editing.training_examples import TrainingExamples
from wisecli.models.activations import Activations, captured
from wisecli.models.loading import Loaded
from wisecli.models.tokenization import Row, collate, in_batches

# A state so many times as long as usual is one that attention rests on.
_LONG = 1.5
# Made-up questions that a number may answer; of the keys found behind them so many are kept, the least alike.
_ASKED, _KEPT = 64, 6
_NUMBER = ("When ", " year", " date")


@dataclass(frozen=True)
class Rests:
    """States that attention rests on: their keys (P, d_ff), and how far a residual is stretched there (P,)."""

    keys: Tensor
    stretch: Tensor


def usual_length(batches: Sequence[TrainingExamples]) -> float:
    """The median length of the states that predict a target's tokens."""
    lengths = [_lengths(examples.activations)[_places(examples.activations)] for examples in batches]
    return float(torch.cat(lengths).median())


def stretch(part: Activations, usual: float) -> Tensor:
    """By how much a residual is stretched at every state (B, T - first): 1 where attention does not rest.

    Where a norm makes what is added as long as it likes there is nothing to stretch.
    """
    if part.norm is not None or math.isinf(usual):
        return part.hidden.new_ones(part.hidden.shape[:2], dtype=torch.float32)
    times = _lengths(part) / usual
    return times.where(times > _LONG, 1.0)


def spaces_first(loaded: Loaded, rows: Mapping[int, Row]) -> dict[int, list[int]]:
    """The edits, by their numbers, whose targets begin with a token of nothing but space, by that token."""
    found: dict[int, list[int]] = {}
    for number, row in rows.items():
        if len(row.target) > 1 and not row.unwanted and str(loaded.tokenizer.decode([row.target[0]])).isspace():
            found.setdefault(row.target[0], []).append(number)
    return found


@torch.no_grad()
def rests_at(loaded: Loaded, task: Task, token: int) -> Rests:
    """What a token is behind made-up questions, where attention rests on it."""
    rows = [Row(tuple(loaded.tokenizer(text)["input_ids"]), (token, token)) for text in _questions()]
    batches = in_batches(rows, task.settings.batch_size)
    parts = (collate([rows[index] for index in indices]).to(loaded.device) for indices in batches)
    keys, times = [], []
    for part in captured(task.model, task.site, parts, stream=loaded.stream, above=False):
        column = part.batch.start + 1 - part.first
        keys.append(part.keys[:, column].float().cpu())
        times.append(stretch(part, task.usual)[:, column].cpu())
    found, long = torch.cat(keys), torch.cat(times)
    chosen = _least_alike(found[long > 1])
    return Rests(found[long > 1][chosen], long[long > 1][chosen])


def with_rests(
    loaded: Loaded, task: Task, evidence: Evidence, residuals: Mapping[AnswerKey, Tensor], rows: Mapping[int, Row]
) -> Evidence:
    """The evidence with keys for what follows a target's first token, of edits whose first token is a mere space.

    Args:
        rows: of edits after their bare prompts, by their numbers.
    """
    parts = [evidence]
    for token, edits in spaces_first(loaded, rows).items():
        rests = rests_at(loaded, task, token)
        parts += [_rested(rests, number, residuals[AnswerKey(number)][1].float().cpu()) for number in edits]
    return Evidence.joined(parts)


def _rested(rests: Rests, edit: int, residual: Tensor) -> Evidence:
    """What of an edit's evidence is added where attention rests, for a residual (d,) of its target's second token."""
    count = len(rests.keys)
    return Evidence(
        keys=rests.keys,
        residuals=residual * rests.stretch[:, None],
        edit=torch.full((count,), edit),
        position=torch.ones(count, dtype=torch.long),
        context=torch.full((count,), RESTING),
        held_out=torch.zeros(count, dtype=torch.bool),
        negative_similarity=torch.zeros(count),
        chat=torch.zeros(count, dtype=torch.bool),
    )


def _questions() -> list[str]:
    chance = random.Random(0)
    asked = [
        wording.replace("{}", subject)
        for relation in relations()
        for wording in relation.wordings
        if wording.endswith("?") and any(word in wording for word in _NUMBER)
        for subject in made_up_subjects(relation.kind, 1, chance)
    ]
    return asked[:: max(1, len(asked) // _ASKED)][:_ASKED]


def _least_alike(keys: Tensor) -> list[int]:
    """Which of some keys to keep: the first, then each time the one least like those that are kept."""
    chosen: list[int] = [0] if len(keys) else []
    alike = F.normalize(keys, dim=-1) @ F.normalize(keys, dim=-1).T
    while len(chosen) < min(_KEPT, len(keys)):
        chosen.append(int(alike[chosen].amax(0).argmin()))
    return chosen


def _lengths(part: Activations) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(part.hidden.float(), dim=-1)
    return lengths


def _places(part: Activations) -> tuple[Tensor, Tensor]:
    rows, columns = part.batch.labelled
    return rows, columns - part.first
