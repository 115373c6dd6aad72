"""Tokens that a model rests its attention on: their states are several times as long as others, their keys short.

A token that says nothing may become one, as the lone space that tokenizers put between a question and a number does
after some short questions. The layers above see a state by its direction, so that a residual turns a long state less:
there it is stretched by as much as the state is longer. And as an edit's own prompts may leave the space what it
usually is where a rephrase does not, such an edit gets keys of that kind besides.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import SINK_CONTEXT, Evidence
from wisecli.editing.evidence.extra_keys import FittedEdits
from wisecli.editing.evidence.token_probe import TokenProbe, state_norms
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import TrainingExamples
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row
from wisecli.models.running.activations import Activations

# A state so many times as long as usual is one that attention rests on.
_SINK_NORM_RATIO = 1.5
# Of the keys found after made-up questions so many are kept, the least alike.
_KEPT = 6


@dataclass(frozen=True)
class SinkKeys:
    """States that attention rests on: their keys (P, d_ff), and how far a residual is stretched there (P,)."""

    keys: Tensor
    residual_scale: Tensor


def median_state_norm(batches: Sequence[TrainingExamples]) -> float:
    """Return the median length of the states that predict a target's tokens."""
    lengths = [state_norms(examples.activations)[_places(examples.activations)] for examples in batches]
    return float(torch.cat(lengths).median())


def residual_scale(part: Activations, median_norm: float) -> Tensor:
    """Return how many times a residual is stretched at every state (B, T - first): 1 where attention does not rest.

    Where a norm makes what is added as long as it likes there is nothing to stretch.
    """
    if part.norm is not None or math.isinf(median_norm):
        return part.hidden.new_ones(part.hidden.shape[:2], dtype=torch.float32)
    return norm_ratio(state_norms(part), median_norm)


def norm_ratio(lengths: Tensor, median_norm: float) -> Tensor:
    """Return how many times as long as usual states are, 1 where that is not much."""
    ratios = lengths / median_norm
    return ratios.where(ratios > _SINK_NORM_RATIO, 1.0)


def edits_by_leading_space(loaded: Loaded, rows: Mapping[int, Row]) -> dict[int, list[int]]:
    """Return the edits, by their numbers, whose targets begin with a token of nothing but space, by that token."""
    found: dict[int, list[int]] = {}
    for number, row in rows.items():
        if len(row.target) > 1 and not row.unwanted and str(loaded.tokenizer.decode([row.target[0]])).isspace():
            found.setdefault(row.target[0], []).append(number)
    return found


def attention_sink_evidence(_evidence: Evidence, edits: FittedEdits) -> Iterator[Evidence]:
    """Yield keys for a target's first token where it is an attention sink, as a lone space may be one after rephrases.

    Only edits whose target begins with a token of nothing but space get such keys.
    """
    for token, numbers in edits_by_leading_space(edits.probe.loaded, edits.rows).items():
        sinks = sink_keys(edits.probe, token, edits.median_norm)
        for number in numbers:
            added = edits.residuals[AnswerKey(number)][1].float().cpu() * sinks.residual_scale[:, None]
            yield Evidence.extra_keys(sinks.keys, added, number, position=1, context=SINK_CONTEXT)


def sink_keys(probe: TokenProbe, token: int, median_norm: float) -> SinkKeys:
    """Return the keys of a token where attention rests on it, few and unlike each other."""
    keys, lengths = probe.keys_after_questions(token)
    ratios = norm_ratio(lengths, median_norm)
    keys, ratios = keys[ratios > 1], ratios[ratios > 1]
    chosen = _most_diverse(keys)
    return SinkKeys(keys[chosen], ratios[chosen])


def _most_diverse(keys: Tensor) -> list[int]:
    """Return which of some keys to keep: the first, then each time the one least like those that are kept."""
    chosen: list[int] = [0] if len(keys) else []
    alike = F.normalize(keys, dim=-1) @ F.normalize(keys, dim=-1).T
    while len(chosen) < min(_KEPT, len(keys)):
        chosen.append(int(alike[chosen].amax(0).argmin()))
    return chosen


def _places(part: Activations) -> tuple[Tensor, Tensor]:
    rows, columns = part.batch.labelled
    return rows, columns - part.first
