"""Fits late interaction and the request gate to further edits, comparing them with nearby prompts of the memory alone.

How surely prompts mean the edits that a memory holds was found when it was merged. Of those, few have subjects like
that of a further edit; with them alone further edits are compared, as if they were all that there is.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.artifacts.shard import PromptStates
from wisecli.environment import has_quick_bfloat16
from wisecli.memory.fitting.former_memory import FormerMemory
from wisecli.memory.fitting.late_interaction_fitting import (
    ComparedPrompts,
    FittedLateInteraction,
    compared_forms,
    compared_prompts,
    in_order,
)
from wisecli.memory.fitting.request_gate_fitting import request_gate_tensors
from wisecli.memory.merging.near_prompts import NearPrompts
from wisecli.routing.deciding.late_interaction import LateInteraction

# Tokens that are projected at a time.
_TOKENS = 1 << 13
_OF_TOKENS = ("prompt_token_embeddings", "token_weights", "token_to_prompt")


def fit_further_edits(
    heads: RouterHeads, prompts: PromptStates, edits: int, former: FormerMemory
) -> tuple[FittedLateInteraction, dict[str, Tensor]]:
    """Return late interaction fitted to the prompts of M edits, and the tensors of the request gate.

    Args:
        former: a memory of the first edits, by the same heads.
    """
    compared, others = prompts.compared, torch.arange(former.edits, edits)
    alone = compared_prompts(heads, _only(compared, others), len(others))
    chosen = torch.cat([_near_edits(heads, compared, edits, former, alone), others])
    part = compared_prompts(heads, _only(compared, chosen), len(chosen))
    joined, possible = _joined(former, part, chosen, edits), former.probs.possible
    if possible is not None:
        possible = torch.cat([possible, torch.arange(former.prompts, len(joined.own_probs))])
    fitted = FittedLateInteraction.of(joined, heads, possible)
    return fitted, request_gate_tensors(heads, prompts, fitted, former.tensors)


def _only(prompts: PromptStates, edits: Tensor) -> PromptStates:
    """Return the prompts of some edits (e,), ascending, with the edits renumbered by their index in these."""
    own = prompts.rows(torch.isin(prompts.edit, edits))
    return replace(own, edit=torch.searchsorted(edits, own.edit.long()))


def _near_edits(
    heads: RouterHeads, prompts: PromptStates, edits: int, former: FormerMemory, alone: ComparedPrompts
) -> Tensor:
    """Return the edits of a memory with a subject like that of a further one, ascending: (e,).

    Args:
        alone: what was fitted to the further edits by themselves.
    """
    prompts, prompt_index, _, form = in_order(prompts)
    tensors = _with_prompts(former, alone.tensors, torch.arange(former.edits, edits), former.edits, heads=1)
    groups = compared_forms(form)
    # Prompts of no group are compared with none.
    projected = _projected_subjects(heads, prompts.states, (groups[prompt_index] >= 0).nonzero().flatten())
    near = NearPrompts(LateInteraction(tensors, edits), projected, prompt_index)
    first, second = near.similar_edits(groups, beside=former.edits)
    both = torch.cat([first, second])
    found: Tensor = both[both < former.edits].unique()
    return found


def _projected_subjects(heads: RouterHeads, states: Tensor, rows: Tensor) -> Tensor:
    """Return some rows (m,) of states (n, d) under the projection of subjects, of length 1, and zero for the others:
    (1, n, k), in as few bits as is quicker.
    """
    dtype = torch.bfloat16 if has_quick_bfloat16() else torch.float32
    weight, bias = heads.proj_weight[0].to(dtype), heads.proj_bias[0].to(dtype)
    projected = torch.zeros(1, len(states), len(weight), dtype=dtype)
    for batch in rows.split(_TOKENS):
        projected[0, batch] = F.normalize(F.linear(states[batch].to(dtype), weight, bias), dim=-1)
    return projected


def _joined(former: FormerMemory, part: ComparedPrompts, chosen: Tensor, edits: int) -> ComparedPrompts:
    """Join what a former memory knows of its edits with what was fitted to some of them and all further ones.

    Args:
        part: fitted to some edits (e,), of which the further ones come last.
    """
    tensors = _with_prompts(former, part.tensors, chosen, former.edits)
    further = chosen[part.tensors["late_interaction.prompt_to_edit"]] >= former.edits
    own = torch.cat([former.probs.own, part.own_probs[further]])
    others = F.pad(former.probs.other, (0, edits - former.edits)).scatter_reduce(0, chosen, part.other_probs, "amax")
    return ComparedPrompts(tensors, own, others, LateInteraction(tensors, edits))


def _with_prompts(
    former: FormerMemory, tensors: dict[str, Tensor], chosen: Tensor, first: int, *, heads: int = 2
) -> dict[str, Tensor]:
    """Return the tensors ``LATE_INTERACTION`` of a memory with the kept prompts of further edits after its own.

    Args:
        tensors: the same of some edits (e,), of which those from ``first`` on are further ones.
        heads: 1 leaves out the tokens of relations.
    """
    named = {name: f"late_interaction.{name}" for name in (*_OF_TOKENS, "prompt_to_edit")}
    held, added = former.tensors, tensors
    owner = chosen[added[named["prompt_to_edit"]]]
    other, before = int((owner < first).sum()), former.prompts
    count = before + len(owner) - other
    # Tokens of subjects come first, those of the memory before further ones.
    parts: dict[str, list[Tensor]] = {name: [] for name in _OF_TOKENS}
    for head in range(heads):
        for source, own, skipped, start in ((held, before, 0, 0), (added, len(owner), other, before)):
            prompt = source[named["token_to_prompt"]] - head * own
            rows = ((prompt >= skipped) & (prompt < own)).nonzero().flatten()
            parts["token_to_prompt"].append(prompt[rows] - skipped + start + head * count)
            for name in _OF_TOKENS[:2]:
                parts[name].append(source[named[name]][rows])
    joined = {named[name]: torch.cat(own) for name, own in parts.items()}
    return {**added, **joined, named["prompt_to_edit"]: torch.cat([held[named["prompt_to_edit"]], owner[other:]])}
