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
from wisecli.editing.training_examples import TrainingExamples
from wisecli.models.activations import Activations, captured
from wisecli.models.loading import Loaded
from wisecli.models.site import Site
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
    return beyond(_lengths(part), usual)


def beyond(lengths: Tensor, usual: float) -> Tensor:
    """How many times as long as usual states are, 1 where that is not much."""
    times = lengths / usual
    return times.where(times > _LONG, 1.0)


def spaces_first(loaded: Loaded, rows: Mapping[int, Row]) -> dict[int, list[int]]:
    """The edits, by their numbers, whose targets begin with a token of nothing but space, by that token."""
    found: dict[int, list[int]] = {}
    for number, row in rows.items():
        if len(row.target) > 1 and not row.unwanted and str(loaded.tokenizer.decode([row.target[0]])).isspace():
            found.setdefault(row.target[0], []).append(number)
    return found


class Behind:
    """What tokens are behind made-up questions; each is asked once for all shards."""

    def __init__(self, loaded: Loaded, site: Site, batch_size: int) -> None:
        self.loaded, self.site, self.batch_size = loaded, site, batch_size
        self._known: dict[tuple[int, str, int], tuple[Tensor, Tensor]] = {}

    def rests(self, token: int, usual: float) -> Rests:
        """The keys of a token where attention rests on it, few and unlike each other."""
        keys, lengths = self.asked(token)
        times = beyond(lengths, usual)
        keys, times = keys[times > 1], times[times > 1]
        chosen = _least_alike(keys)
        return Rests(keys[chosen], times[chosen])

    def asked(self, token: int, form: str = "{}", *, every: int = 1) -> tuple[Tensor, Tensor]:
        """Keys (Q, d_ff) and lengths of states (Q,) of a token behind one question in ``every``, in a form."""
        which = (token, form, every)
        if which not in self._known:
            self._known[which] = self._read(token, [form.replace("{}", text) for text in _questions()[::every]])
        return self._known[which]

    @torch.no_grad()
    def _read(self, token: int, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokenizer, device = self.loaded.tokenizer, self.loaded.device
        rows = [Row(tuple(tokenizer(text)["input_ids"]), (token, token)) for text in texts]
        parts = (collate([rows[at] for at in indices]).to(device) for indices in in_batches(rows, self.batch_size))
        keys, lengths = [], []
        for part in captured(self.loaded.model, self.site, parts, stream=self.loaded.stream, above=False):
            column = part.batch.start + 1 - part.first
            keys.append(part.keys[:, column].float().cpu())
            own = _lengths(part)[:, column].cpu()
            lengths.append(own if part.norm is None else torch.zeros_like(own))
        return torch.cat(keys), torch.cat(lengths)


def with_rests(
    behind: Behind, evidence: Evidence, residuals: Mapping[AnswerKey, Tensor], rows: Mapping[int, Row], usual: float
) -> Evidence:
    """The evidence with keys for what follows a target's first token, of edits whose first token is a mere space.

    Args:
        rows: of edits after their bare prompts, by their numbers.
        usual: the length of a state that attention does not rest on.
    """
    parts = [evidence]
    for token, edits in spaces_first(behind.loaded, rows).items():
        rests = behind.rests(token, usual)
        for edit in edits:
            added = residuals[AnswerKey(edit)][1].float().cpu() * rests.stretch[:, None]
            parts.append(Evidence.beside(rests.keys, added, edit, position=1, context=RESTING))
    return Evidence.joined(parts)


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
