"""The routing rule: which memory answers which token. Needs torch only; exports carry this very file.

    token routing       a memory answers where its score exceeds its threshold (WISE, equations 3 and 6)
    sequence routing    what a row's last prompt token decides holds for that row from there on; of a lookup, whether
                        it answers: with which key, every token after the prompt says for itself

Whoever wants to know what answers asks :func:`route`: the routed matrix, evaluation, ``wise explain``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .prompt_gate import UNROUTED, Prompt
from .scores import INSIDE, MemoryScores


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
