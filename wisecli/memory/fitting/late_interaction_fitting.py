"""Fits late interaction to a memory's edits: its tensors and thresholds, from the states of edits' own prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.artifacts.shard import PromptStates, half
from wisecli.memory.merging.near_prompts import NearPrompts, padded_texts
from wisecli.routing.deciding.late_interaction import HOPELESS, LATE_INTERACTION, LateInteraction
from wisecli.routing.deciding.request_gate import (
    LOGIT_OFFSET,
    Request,
    RequestGate,
    batch_mentions,
    mention_features,
    unsureness,
)

# How sure a prompt must be to mean an edit; and how much surer than the prompts of all other edits, up to a limit.
MIN_EDIT_PROB, _PROB_MARGIN, _MAX_THRESHOLD = 0.5, 1.25, 0.95
# How sure where no subject must be named: the same question about another subject stays below.
MIN_UNNAMED_PROB = 0.95
# How much less sure than an edit's own prompt another may be, where that prompt is not sure of itself.
_OWN, _JUST = 0.9, 0.99
# What a token counts that belongs to the other head: nothing, unless there are no others; and the least that counts.
_OTHER, _LEAST = 1e-4, 5e-3
# The form of kept prompts that are led in, and from which on they are in other languages.
_LED_IN, _OTHER_LANGUAGES = 2, 4
# How far below the log-odds of its own prompt an edit's offset lies, if that is below nought, and how low it may.
_LOGIT_MARGIN, _MIN_LOGIT_OFFSET = 1.0, -50.0
# Prompts that the request gate reads at a time, and tokens that are projected at a time.
_AT_A_TIME, _TOKENS = 1024, 1 << 15
# Sums of tokens' states that differ by less than this share are of the very same tokens.
_SAME = 1e-3


@dataclass(frozen=True)
class FittedLateInteraction:
    """The tensors ``LATE_INTERACTION`` of M edits, and how surely prompts mean them.

    ``own_probs`` (g,) is for each kept prompt how surely it means its edit, ``written_probs`` (M,) the same of prompts
    as are written, ``other_probs`` (M,) how surely any prompt of another edit means an edit, ``unrelated_probs`` (u, M)
    the same for unrelated texts.
    """

    tensors: dict[str, Tensor]
    own_probs: Tensor
    written_probs: Tensor
    other_probs: Tensor
    unrelated_probs: Tensor

    def thresholds(self, least: Tensor) -> tuple[float, ...]:
        """Return each edit's threshold, above what other edits' prompts reach if that leaves room for its own prompt.

        ``least`` (M,) is how surely a prompt must mean each edit at least.

        Where its own prompt is less sure than that, and surer than all that it must keep apart from, it is lower.
        Of the prompts of other edits that mean it as surely, each means its own more.
        """
        raised = (self.other_probs * _PROB_MARGIN).clamp(min=least, max=least.clamp(min=_MAX_THRESHOLD))
        unrelated = self.unrelated_probs.amax(0)
        found = raised
        for share, apart in ((_JUST, unrelated), (_OWN, self.other_probs.maximum(unrelated))):
            lowered = self.written_probs * share
            found = raised.minimum(lowered).where(lowered > apart, found)
        return tuple(found.tolist())


def fit_late_interaction(heads: RouterHeads, prompts: PromptStates, edits: int) -> FittedLateInteraction:
    """Return late interaction fitted to the prompts of M edits, by the projections of heads."""
    forms = int(prompts.form.max()) + 1
    _, prompt_index = (prompts.edit.long() * forms + prompts.form.long()).unique(return_inverse=True)
    count = int(prompt_index.max()) + 1
    prompt_to_edit = torch.zeros(count, dtype=torch.long).index_copy(0, prompt_index, prompts.edit.long())
    token_embeddings, token_weights, token_to_prompt = _kept_tokens(heads, prompts, prompt_index, count)
    tensors = {
        "late_interaction.proj_weight": heads.proj_weight,
        "late_interaction.proj_bias": heads.proj_bias,
        "late_interaction.logit_scale": heads.logit_scale,
        "late_interaction.logit_offset": heads.logit_offset,
        "late_interaction.prompt_token_embeddings": token_embeddings,
        "late_interaction.token_to_prompt": token_to_prompt,
        "late_interaction.token_weights": token_weights,
        "late_interaction.prompt_to_edit": prompt_to_edit,
        "late_interaction.special_token_ids": heads.special_token_ids,
    }
    assert tensors.keys() == set(LATE_INTERACTION)
    late_interaction = LateInteraction(tensors, edits)
    own_probs, others = _own_prompt_probs(late_interaction, prompts, prompt_index)
    unrelated = text_edit_probs(late_interaction, heads.unrelated.float(), heads.text.long(), int(heads.text.max()) + 1)
    # Kept prompts are in order of their edits, and of an edit's the one as it is written comes first.
    first = torch.searchsorted(prompt_to_edit, torch.arange(edits))
    written_probs = own_probs[first.clamp(max=count - 1)] * (
        prompt_to_edit[first.clamp(max=count - 1)] == torch.arange(edits)
    )
    return FittedLateInteraction(tensors, own_probs, written_probs, others, unrelated)


def _kept_tokens(
    heads: RouterHeads, prompts: PromptStates, prompt_index: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the projected tokens (m, k) by which prompts are found, their weights and which prompt each is of (m,).

    Those of subjects come first; for those of relations, ``count`` is added to the prompt's number.
    """
    token_embeddings, token_weights, token_to_prompt = [], [], []
    for head in range(2):
        along = [part.float() @ heads.token_weight[head].float() for part in prompts.states.split(_TOKENS)]
        weights = F.softplus(torch.cat(along) + heads.token_bias[head])
        marked = prompts.subject if head == 0 else ~prompts.subject
        share = _normalized(torch.where(marked, weights, weights * _OTHER), prompt_index, count)
        kept = share >= _LEAST
        projected = heads.proj_weight[head].float(), heads.proj_bias[head].float()
        parts = prompts.states[kept].split(_TOKENS)
        token_embeddings += [half(F.normalize(F.linear(part.float(), *projected), dim=-1)) for part in parts]
        token_weights.append(_normalized(share[kept], prompt_index[kept], count))
        token_to_prompt.append(prompt_index[kept] + head * count)
    return torch.cat(token_embeddings), torch.cat(token_weights), torch.cat(token_to_prompt)


def request_gate_tensors(heads: RouterHeads, prompts: PromptStates, fitted: FittedLateInteraction) -> dict[str, Tensor]:
    """Return the tensors ``REQUEST_GATE`` and each edit's offset; none if no gate was learned for the base model.

    A prompt asks an edit that it mentions where that is more likely than not. Where an edit's own prompt is less
    likely, its offset lies below that.
    """
    if not heads.request_gate:
        return {}
    tensors = fitted.tensors
    edits = (
        int(tensors["late_interaction.prompt_to_edit"].max()) + 1
        if len(tensors["late_interaction.prompt_to_edit"])
        else 0
    )
    late_interaction, logit_offset = LateInteraction(tensors, edits), torch.zeros(edits)
    gate = RequestGate({**heads.request_gate, LOGIT_OFFSET: logit_offset})
    first_states, prompts = prompts.openings, prompts.compared
    # As it is written, and in other languages.
    written = prompts.rows((prompts.form == 0) | (prompts.form >= _OTHER_LANGUAGES))
    each = torch.stack([written.edit.long(), written.form.long()], 1)
    pairs, sizes = each.unique_consecutive(dim=0, return_counts=True)
    own_probs = fitted.own_probs[_kept_prompts(prompts, pairs)]
    states, tokens_of = written.states.split(sizes.tolist()), written.token.split(sizes.tolist())
    for some in torch.arange(len(pairs)).split(_AT_A_TIME):
        own = torch.cat([states[number] for number in some.tolist()]).float()
        turned = late_interaction.project(own[None], torch.ones(1, len(own), dtype=torch.bool)).projected[:, 0]
        counts = sizes[some].tolist()
        own_tokens = [tokens_of[number] for number in some.tolist()]
        parts = zip(own.split(counts), turned.split(counts, 1), own_tokens, pairs[some].tolist(), strict=True)
        edit_tokens = late_interaction.edit_tokens(pairs[some, 0])
        requests = [
            Request(one, near, tokens, first_state=first_states.get((edit, form)), marks=gate.marks(ids))
            for (one, near, ids, (edit, form)), tokens in zip(parts, edit_tokens, strict=True)
        ]
        log_odds = gate.log_odds(batch_mentions(mention_features(requests))) + unsureness(own_probs[some])
        lower = (log_odds - _LOGIT_MARGIN).clamp(_MIN_LOGIT_OFFSET, 0.0)
        logit_offset = logit_offset.scatter_reduce(0, pairs[some, 0], lower, "amin")
    return {**heads.request_gate, LOGIT_OFFSET: logit_offset}


def _kept_prompts(prompts: PromptStates, pairs: Tensor) -> Tensor:
    """Return the numbers of kept prompts, by their edits and forms (p, 2): (p,)."""
    forms = int(prompts.form.max()) + 1
    every = (prompts.edit.long() * forms + prompts.form.long()).unique()
    return torch.searchsorted(every, pairs[:, 0] * forms + pairs[:, 1])


def _normalized(weights: Tensor, prompt_index: Tensor, count: int) -> Tensor:
    """Return weights (n,) of tokens, scaled to add up to 1 a prompt."""
    return weights / torch.zeros(count).index_add(0, prompt_index, weights)[prompt_index]


def _own_prompt_probs(
    late_interaction: LateInteraction, prompts: PromptStates, prompt_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how likely each kept prompt means its own edit (g,), and how likely others' prompts mean each (M,)."""
    prompt_to_edit = late_interaction.prompt_to_edit
    sums = torch.zeros(len(prompt_to_edit), prompts.states.shape[1])
    for same_edit, part in zip(prompt_index.split(_TOKENS), prompts.states.split(_TOKENS), strict=True):
        sums.index_add_(0, same_edit, part.float())
    first, second = _twins(sums, torch.bincount(prompt_index, minlength=len(prompt_to_edit)))
    twins: dict[int, list[int]] = {}
    for prompt, edit in zip(first.tolist(), prompt_to_edit[second].tolist(), strict=True):
        twins.setdefault(prompt, []).append(edit)
    near = NearPrompts(late_interaction, prompts, prompt_index)
    own_probs, others = torch.empty(len(prompt_to_edit)), torch.zeros(late_interaction.edits)
    counts = prompt_to_edit.unique_consecutive(return_counts=True)[1].tolist()
    numbers = torch.arange(len(prompt_to_edit)).split(counts)
    for some, edits in zip(numbers, near.similar_edits(_compared_forms(near.form)), strict=True):
        own = edits == prompt_to_edit[some[0]]
        probs = near.probs(some, edits, others[edits].clamp(min=HOPELESS).masked_fill(own, 0.0))
        own_probs[some] = probs[:, own].flatten()
        probs[:, own] = 0.0
        # A prompt of the very same tokens is no other.
        for row, number in enumerate(some.tolist()):
            if number in twins:
                probs[row, torch.isin(edits, torch.tensor(twins[number]))] = 0.0
        others[edits] = others[edits].maximum(probs.amax(0))
    return own_probs, others


def _compared_forms(form: Tensor) -> Tensor:
    """Return the group of forms (g,) in which kept prompts are compared with each other: as written, in small letters,
    and in capitals. A prompt that is led in is written as it is, and one in another language, too.
    """
    return torch.where(form >= _OTHER_LANGUAGES, 0, form).masked_fill(form == _LED_IN, -1)


def _twins(sums: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs of prompts, both ways, with the same tokens, known by equal sums of states (g, d).

    Args:
        sizes: how many tokens each prompt has (g,).
    """
    signs = (torch.arange(sums.shape[1]) % 2 * 2 - 1.0) / sums.shape[1] ** 0.5
    along, across, least = sums @ signs.abs(), sums @ signs, 1.01 * _SAME * sums.norm(dim=-1)
    # No two are further apart along one direction than they are altogether.
    order = along.argsort()
    order = order[sizes[order].argsort(stable=True)]
    sizes, along, across, furthest = sizes[order], along[order], across[order], least.max()
    found: list[Tensor] = []
    first = torch.arange(len(order))
    for apart in range(1, len(order)):
        first = first[first + apart < len(order)]
        second = first + apart
        # What is not close to one is not to those behind it, either.
        close = (sizes[first] == sizes[second]) & (along[second] - along[first] < furthest)
        first, second = first[close], second[close]
        if not len(first):
            break
        near = (across[second] - across[first]).abs() < furthest
        one, other = order[first[near]], order[second[near]]
        distance = (sums[one] - sums[other]).norm(dim=-1)
        found += [
            torch.stack(pair)[:, distance < _SAME * sums[pair[0]].norm(dim=-1)] for pair in ((one, other), (other, one))
        ]
    pairs = torch.cat(found, 1) if found else torch.empty(2, 0, dtype=torch.long)
    return pairs[0], pairs[1]


def text_edit_probs(late_interaction: LateInteraction, states: Tensor, text: Tensor, count: int) -> Tensor:
    """Return the probability that each text means each edit, from its tokens' states (n, d): (texts, M)."""
    probs = torch.empty(count, late_interaction.edits)
    for part, own, there in padded_texts(states, text, count):
        probs[part] = late_interaction(own, there)
    return probs
