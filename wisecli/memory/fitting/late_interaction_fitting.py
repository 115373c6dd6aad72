"""Fits late interaction to a memory's edits: its tensors and thresholds, from the states of edits' own prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.artifacts.shard import PromptStates, half
from wisecli.memory.fitting.unrelated_texts import TextProbs, unrelated_edit_probs
from wisecli.memory.merging.near_prompts import NearPrompts
from wisecli.routing.deciding.late_interaction import HOPELESS, LATE_INTERACTION, LateInteraction

# How sure a prompt must be to mean an edit; and how much surer than the prompts of all other edits, up to a limit.
MIN_EDIT_PROB, _PROB_MARGIN, _MAX_THRESHOLD = 0.5, 1.25, 0.95
# How sure where no subject must be named: the same question about another subject stays below.
MIN_UNNAMED_PROB = 0.95
# How much less sure than an edit's own prompt another may be, where that prompt is not sure of itself.
_OWN, _JUST = 0.9, 0.99
# What a token counts that belongs to the other head: nothing, unless there are no others; and the least that counts.
_OTHER, _LEAST = 1e-4, 5e-3
# The form of kept prompts that are led in, and from which on they are in other languages.
_LED_IN, OTHER_LANGUAGES = 2, 4
# Tokens that are projected at a time, and edits that are compared.
_TOKENS, _EDITS = 1 << 13, 16
# Products have a multiple of so many rows.
_ROWS = 64
# Sums of tokens' states that differ by less than this share are of the very same tokens.
_SAME = 1e-3


@dataclass(frozen=True)
class FittedLateInteraction:
    """The tensors ``LATE_INTERACTION`` of M edits, and the probabilities that prompts mean them.

    ``own_probs`` (g,) are those of kept prompts and their own edits, ``written_probs`` (M,) the same of prompts as they
    are written, ``other_probs`` (M,) the highest of other edits' prompts, ``unrelated`` those of unrelated texts.
    ``late_interaction`` compares prompts with those of the tensors.
    """

    tensors: dict[str, Tensor]
    own_probs: Tensor
    written_probs: Tensor
    other_probs: Tensor
    unrelated: TextProbs
    late_interaction: LateInteraction

    @classmethod
    def of(cls, compared: ComparedPrompts, heads: RouterHeads, possible: Tensor | None = None) -> FittedLateInteraction:
        """Return what was fitted to compared prompts, once unrelated texts are compared with them, too.

        Args:
            possible: the kept prompts that those may mean, if that is known.
        """
        tensors, own, others, late_interaction = compared
        written = written_probs(own, late_interaction.prompt_to_edit, late_interaction.edits)
        unrelated = unrelated_edit_probs(late_interaction, heads, possible)
        return cls(tensors, own, written, others, unrelated, late_interaction)

    def thresholds(self, least: Tensor) -> tuple[float, ...]:
        """Return each edit's threshold, above what other edits' prompts reach if that leaves room for its own prompt.

        ``least`` (M,) is how surely a prompt must mean each edit at least.

        Where its own prompt is less sure than that, and surer than all that it must keep apart from, it is lower.
        Of the prompts of other edits that mean it as surely, each means its own more.
        """
        raised = (self.other_probs * _PROB_MARGIN).clamp(min=least, max=least.clamp(min=_MAX_THRESHOLD))
        unrelated = self.unrelated.probs.amax(0)
        found = raised
        for share, apart in ((_JUST, unrelated), (_OWN, self.other_probs.maximum(unrelated))):
            lowered = self.written_probs * share
            found = raised.minimum(lowered).where(lowered > apart, found)
        return tuple(found.tolist())


class ComparedPrompts(NamedTuple):
    """What is known of M edits when their prompts were compared with each other: of :class:`FittedLateInteraction`."""

    tensors: dict[str, Tensor]
    own_probs: Tensor
    other_probs: Tensor
    late_interaction: LateInteraction


def fit_late_interaction(heads: RouterHeads, prompts: PromptStates, edits: int) -> FittedLateInteraction:
    """Return late interaction fitted to the prompts of M edits, by the projections of heads."""
    return FittedLateInteraction.of(compared_prompts(heads, prompts, edits), heads)


def compared_prompts(heads: RouterHeads, prompts: PromptStates, edits: int) -> ComparedPrompts:
    """Return the tensors ``LATE_INTERACTION`` of M edits, and the probabilities that their prompts mean them."""
    prompts, prompt_index, prompt_to_edit, form = in_order(prompts)
    count = len(form)
    tokens = _ProjectedTokens.of(heads, prompts, prompt_index, count)
    token_embeddings, token_weights, token_to_prompt = _kept_tokens(tokens, prompts.subject, prompt_index, count)
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
    twins = _twins(tokens.sums, torch.bincount(prompt_index, minlength=count))
    near = NearPrompts(late_interaction, tokens.projected, prompt_index)
    del tokens  # with the sums of states
    own_probs, others = _prompt_probs(near, form, twins)
    return ComparedPrompts(tensors, own_probs, others, late_interaction)


def in_order(prompts: PromptStates) -> tuple[PromptStates, Tensor, Tensor, Tensor]:
    """Return prompts in order of their edits and forms, which of them each token is of (n,), and the edit and the form
    of each (g,).
    """
    forms = int(prompts.form.max()) + 1
    number = prompt_numbers(prompts.edit, prompts.form, forms)
    if bool((number.diff() < 0).any()):
        order = number.argsort(stable=True)
        prompts, number = prompts.rows(order), number[order]
    numbers, prompt_index = number.unique_consecutive(return_inverse=True)
    return prompts, prompt_index, numbers // forms, numbers % forms


def written_probs(own_probs: Tensor, prompt_to_edit: Tensor, edits: int) -> Tensor:
    """Return the probability that each edit's prompt, as written, means it (M,), 0 where there is none.

    Args:
        own_probs, prompt_to_edit: of each kept prompt, how surely it means its edit, and which that is (g,).
    """
    # Kept prompts are in order of their edits, and of an edit's the one as it is written comes first.
    first = torch.searchsorted(prompt_to_edit, torch.arange(edits)).clamp(max=len(prompt_to_edit) - 1)
    return own_probs[first] * (prompt_to_edit[first] == torch.arange(edits))


class _ProjectedTokens(NamedTuple):
    """The tokens of g prompts under both projections, of length 1 (2, n, k), what each counts before it is normalized
    (2, n), and the sums of each prompt's states (g, d).
    """

    projected: Tensor
    weights: Tensor
    sums: Tensor

    @classmethod
    def of(cls, heads: RouterHeads, prompts: PromptStates, prompt_index: Tensor, count: int) -> _ProjectedTokens:
        """Project the tokens of ``count`` prompts; ``prompt_index`` (n,) says which prompt each token is of."""
        projected = torch.empty(2, len(prompt_index), heads.proj_weight.shape[1])
        weights, sums = torch.empty(2, len(prompt_index)), torch.zeros(count, prompts.states.shape[1])
        for begin in range(0, len(prompt_index), _TOKENS):
            rows = slice(begin, min(begin + _TOKENS, len(prompt_index)))
            size = rows.stop - begin
            # The last rows of a product are rounded otherwise than rows before them, so a short part is padded.
            states = prompts.states[rows].float()
            if size % _ROWS:
                states = F.pad(states, (0, 0, 0, -size % _ROWS))
            sums.index_add_(0, prompt_index[rows], states[:size])
            for head in range(2):
                embedded = F.linear(states, heads.proj_weight[head].float(), heads.proj_bias[head].float())
                projected[head, rows] = F.normalize(embedded, dim=-1)[:size]
                logits = states @ heads.token_weight[head].float() + heads.token_bias[head]
                weights[head, rows] = F.softplus(logits)[:size]
        return cls(projected, weights, sums)


def _kept_tokens(
    tokens: _ProjectedTokens, subject: Tensor, prompt_index: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the projected tokens (m, k) by which prompts are found, their weights and which prompt each is of (m,).

    Those of subjects (n,) come first; for those of relations, ``count`` is added to the prompt's number.
    """
    token_embeddings, token_weights, token_to_prompt = [], [], []
    for head, weights in enumerate(tokens.weights):
        marked = subject if head == 0 else ~subject
        share = _normalized(torch.where(marked, weights, weights * _OTHER), prompt_index, count)
        kept = (share >= _LEAST).nonzero().flatten()
        token_embeddings.append(half(tokens.projected[head][kept]))
        token_weights.append(_normalized(share[kept], prompt_index[kept], count))
        token_to_prompt.append(prompt_index[kept] + head * count)
    return torch.cat(token_embeddings), torch.cat(token_weights), torch.cat(token_to_prompt)


def prompt_numbers(edit: Tensor, form: Tensor, forms: int) -> Tensor:
    """Return a number of its own for every edit in every form, ascending in that order: (n,) twice → (n,)."""
    return edit.long() * forms + form.long()


def _normalized(weights: Tensor, prompt_index: Tensor, count: int) -> Tensor:
    """Return weights (n,) of tokens, scaled to add up to 1 a prompt."""
    return weights / torch.zeros(count).index_add(0, prompt_index, weights)[prompt_index]


def _prompt_probs(near: NearPrompts, form: Tensor, twins: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the probability that each kept prompt means its own edit (g,), and the highest that another edit's prompt
    means each edit (M,).


    Args:
        form: of each kept prompt (g,).
        twins: pairs of prompts with the same tokens, which do not count as prompts of another edit.
    """
    edits, prompt_to_edit = near.late_interaction.edits, near.late_interaction.prompt_to_edit
    same = twins[0] * edits + prompt_to_edit[twins[1]]
    own_probs, others = torch.empty(near.count), torch.zeros(edits)
    asking, meant = near.similar_edits(compared_forms(form))
    sizes = torch.bincount(asking // _EDITS)
    for first, second in zip(asking.split(sizes.tolist()), meant.split(sizes.tolist()), strict=True):
        own = first == second
        probs = near.probs(first, second, others[second].clamp(min=HOPELESS).masked_fill(own, 0.0))
        prompts, there = near.prompts_of_edit.padded(first)
        own_probs[prompts[own][there[own]]] = probs[own][:, : prompts.shape[1]][there[own]]
        others_probs = probs[:, : prompts.shape[1]].masked_fill(
            torch.isin(prompts * edits + second[:, None], same), 0.0
        )
        others = others.scatter_reduce(0, second, others_probs.amax(1).masked_fill(own, 0.0), "amax")
    return own_probs, others


def compared_forms(form: Tensor) -> Tensor:
    """Return the group of forms (g,) in which kept prompts are compared with each other: as written, in small letters,
    and in capitals. A prompt that is led in is written as it is, and one in another language, too.
    """
    return torch.where(form >= OTHER_LANGUAGES, 0, form).masked_fill(form == _LED_IN, -1)


def _twins(sums: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs of prompts, both ways, with the same tokens, known by equal sums of states (g, d).

    Args:
        sizes: how many tokens each prompt has (g,).
    """
    # No two are further apart in one dimension than they are altogether, so those are looked at that tell most.
    along, across = sums[:, sums.var(0, correction=0).topk(2).indices].unbind(1)
    # Of two that are close neither is longer by more than the hundredth that is added.
    furthest = 1.01 * _SAME * sums.norm(dim=-1)
    order = along.argsort()
    order = order[sizes[order].argsort(stable=True)]
    sizes, along, across, furthest = sizes[order], along[order], across[order], furthest[order]
    found: list[Tensor] = []
    first = torch.arange(len(order))
    for apart in range(1, len(order)):
        first = first[first + apart < len(order)]
        second = first + apart
        # What is not close to one is not to those after it, either.
        close = (sizes[first] == sizes[second]) & (along[second] - along[first] < furthest[first])
        first, second = first[close], second[close]
        if not len(first):
            break
        near = (across[second] - across[first]).abs() < furthest[first]
        i, j = order[first[near]], order[second[near]]
        distance = (sums[i] - sums[j]).norm(dim=-1)
        found += [torch.stack(pair)[:, distance < _SAME * sums[pair[0]].norm(dim=-1)] for pair in ((i, j), (j, i))]
    pairs = torch.cat(found, 1) if found else torch.empty(2, 0, dtype=torch.long)
    return pairs[0], pairs[1]
