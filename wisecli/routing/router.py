"""The routing rule: which memory answers which token. Needs torch only; exports carry this very file.

    token routing       a memory answers where its score exceeds its threshold (WISE, equations 3 and 6)
    sequence routing    what a row's last prompt token decides holds for that row from there on; of a lookup, whether
                        it answers: with which key, every token after the prompt says for itself
    by meaning          the same, but all of a prompt's tokens decide which edit answers; see :mod:`.meaning`
    mean routing        the mean of the scores of a prompt's tokens decides, and holds for all of them too, as in the
                        code of the paper's authors

Whoever wants to know what answers asks :func:`route`: the routed matrix, evaluation, ``wise explain``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .prompt_gate import UNROUTED, Prompt
from .scores import INSIDE, REACH, MemoryScores


@dataclass(frozen=True)
class RoutingDecision:
    """What answers each token of a pass, and why.

    ``strength`` (B, T) is the best score as a multiple of its threshold, ``nearest`` (B, T) the memory that it belongs
    to, or of a lookup the key. ``chosen`` (B, T) is the memory or key that answers, ``UNROUTED`` where the main memory
    does. ``at_prompt`` (B, 1) is what each row's last prompt token decided, if that has a say.
    """

    strength: Tensor
    nearest: Tensor
    chosen: Tensor
    at_prompt: Tensor | None = None


def route(
    memory: MemoryScores,
    keys: Tensor,
    prompt: Prompt | None = None,
    *,
    prompt_opens: bool = False,
    forced: Tensor | None = None,
) -> RoutingDecision:
    """Decide which memory, or which key of a lookup, answers each token.

    Args:
        keys: inputs of the matrix, (B, T, d_ff).
        prompt: where the prompts end and what they name; sequence routing needs it.
        prompt_opens: with token routing, nothing answers from a prompt's last token on unless that token opens it, so
            that a right answer which is shown does not open its own memory.
        forced: the memory (B, 1) that answers from the prompt's end on, whatever its score, of a lookup by the nearest
            of its keys; ``UNROUTED`` leaves a row to its scores. Without a prompt it answers the last token.
    """
    if prompt is None and forced is None:
        strength, nearest = memory.nearest(keys)
        return RoutingDecision(strength, nearest, nearest.where(strength > 1, UNROUTED))
    column = torch.arange(keys.shape[1], device=keys.device)
    if memory.meaning is not None and prompt is not None:
        return _by_meaning(memory, keys, prompt, column, forced)
    if memory.routing == "mean" and prompt is not None:
        return _by_mean(memory, keys, prompt, column, forced)
    after = None if prompt is None else prompt.after(column)
    named = None if prompt is None else prompt.named
    strength, nearest = memory.nearest(keys, after, named)
    chosen = nearest.where(strength > 1, UNROUTED)
    at_prompt = None
    if prompt is not None and (prompt_opens or memory.routing == "sequence"):
        at_prompt = _decided(chosen, prompt)
        chosen = _held(memory, chosen, at_prompt, prompt.answers(column))
    if forced is not None:
        answers = column == keys.shape[1] - 1 if prompt is None else prompt.answers(column)
        own = _own(memory, keys, forced, after)
        chosen = own.where(answers & (forced != UNROUTED), chosen)
    if prompt is not None and prompt.real is not None:
        chosen = chosen.where(prompt.real, UNROUTED)
    return RoutingDecision(strength, nearest, chosen, at_prompt)


def _by_meaning(
    memory: MemoryScores, keys: Tensor, prompt: Prompt, column: Tensor, forced: Tensor | None
) -> RoutingDecision:
    """The edit that each row's prompt means and names answers from the prompt's end on, by the nearest of its own keys.

    Inside an answer a token must come near one of them, or the answer is over.
    """
    strength = keys.new_zeros(keys.shape[:2], dtype=torch.float32)
    if prompt.end is None:
        assert prompt.held is not None, "a pass without a prompt's end follows one that had it"
        meant = likeliest = prompt.held
    else:
        sure, likeliest = (each[:, None] for each in memory.strongest(prompt.meant))
        strength = torch.where(column == prompt.end, sure, strength)
        meant = likeliest.where(sure > 1, UNROUTED)
        if prompt.held is not None:
            meant = meant.where(prompt.end >= 0, prompt.held)
    edits = meant if forced is None else forced.where(forced != UNROUTED, meant)
    answers = prompt.answers(column)
    if prompt.real is not None:
        answers = answers & prompt.real
    inside = prompt.after(column).expand(keys.shape[:2])
    chosen = torch.full_like(strength, UNROUTED, dtype=torch.long)
    nearest = chosen.clone()
    asked = torch.where(inside, edits, likeliest if forced is None else edits)
    rows, columns = (answers & (asked != UNROUTED)).nonzero(as_tuple=True)
    if len(rows):
        within = inside[rows, columns]
        cosine, place = memory.of_edits(keys[rows, columns], asked[rows, columns], within)
        opened = (asked == edits)[rows, columns] & (~within | (cosine > REACH))
        nearest[rows, columns] = place
        chosen[rows, columns] = place.where(opened, UNROUTED)
        strength[rows, columns] = strength[rows, columns].where(~within, cosine / REACH)
    return RoutingDecision(strength, nearest, chosen, meant)


def _by_mean(
    memory: MemoryScores, keys: Tensor, prompt: Prompt, column: Tensor, forced: Tensor | None
) -> RoutingDecision:
    """One memory a row answers every token, its prompt's too: that which the prompt calls most strongly on the mean."""
    strength = keys.new_zeros(keys.shape[:2], dtype=torch.float32)
    if prompt.end is None:
        assert prompt.held is not None, "a pass without a prompt's end follows one that had it"
        decided = nearest = prompt.held
    else:
        read = (column <= prompt.end) if prompt.real is None else (column <= prompt.end) & prompt.real
        weights = read / read.sum(1, keepdim=True).clamp(min=1)
        called = torch.einsum("btm,bt->bm", memory.scores(keys).float(), weights.expand(keys.shape[:2]))
        sure, nearest = (each[:, None] for each in _most_called(memory, called))
        strength = sure.expand_as(strength)
        decided = nearest.where(sure > 1, UNROUTED)
        if prompt.held is not None:
            decided = decided.where(prompt.end >= 0, prompt.held)
    own = decided if forced is None else forced.where(forced != UNROUTED, decided)
    chosen = own.expand(keys.shape[:2])
    if prompt.real is not None:
        chosen = chosen.where(prompt.real, UNROUTED)
    return RoutingDecision(strength, nearest.expand(keys.shape[:2]), chosen, decided)


def _most_called(memory: MemoryScores, called: Tensor) -> tuple[Tensor, Tensor]:
    """The memory that rows (B, M) call most strongly of those called beyond their thresholds, by what factor: two (B,).

    If none is, the one nearest to that.
    """
    factor, nearest = memory.strongest(called)
    if called.shape[-1] == 1:
        return factor, nearest
    beyond = called / called.new_tensor(memory.thresholds)
    most = called.where(beyond > 1, -torch.inf).argmax(-1)
    chosen = most.where(factor > 1, nearest)
    return beyond.gather(-1, chosen[:, None])[:, 0], chosen


def _decided(chosen: Tensor, prompt: Prompt) -> Tensor:
    """What each row's last prompt token chose (B, 1), in this pass or in an earlier one."""
    if prompt.end is None:
        assert prompt.held is not None, "a pass without a prompt's end follows one that had it"
        return prompt.held
    here = chosen.gather(1, prompt.end.clamp(min=0))
    return here if prompt.held is None else here.where(prompt.end >= 0, prompt.held)


def _held(memory: MemoryScores, chosen: Tensor, at_prompt: Tensor, answers: Tensor) -> Tensor:
    """Choices (B, T) under what the prompts decided (B, 1), at the tokens that ``answers`` (B or 1, T) marks."""
    kept = chosen.where(at_prompt != UNROUTED, UNROUTED)
    if memory.routing == "token":
        return kept.where(answers, chosen)
    held = kept if memory.kind == "lookup" else at_prompt.expand_as(chosen)
    return held.where(answers, UNROUTED)


def _own(memory: MemoryScores, keys: Tensor, forced: Tensor, after: Tensor | None) -> Tensor:
    """The forced memory itself (B, 1), or of a lookup the nearest of its keys at each token (B, T)."""
    if memory.kind != "lookup":
        return forced
    others = memory.owner != forced[..., None]
    if memory.routing == "sequence" and after is not None:
        others = others | ((memory.metric == INSIDE) != after[..., None])
    return memory.cosines(keys).masked_fill(others, -torch.inf).argmax(-1)
