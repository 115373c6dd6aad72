"""Compares the prompts of many edits with each other: exactly only those whose subjects are alike.

Thousands of edits are compared with each other, and hardly any two are alike. So subjects are compared first with as
few bits as this processor is quicker with, and prompts with those in the same form alone: names that are alike in any
two forms are nearly as alike in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import PromptStates
from wisecli.environment import has_bfloat16_tiles
from wisecli.routing.deciding.late_interaction import HOPELESS, LateInteraction

# Prompts that are compared at a time, and tokens of others that they are compared with.
_AT_A_TIME, _TOKENS = 64, 2048
# How much less alike than would do two subjects in one form may be; cosines of few bits are off by less than a third.
_SLACK = 0.05


class NearPrompts:
    """The kept prompts of a memory, compared with each other.

    Args:
        late_interaction: that of the memory; kept prompts are in order of their edits.
        prompts: the states of those prompts' tokens.
        prompt_index: the kept prompt that each token is of (n,).
    """

    def __init__(self, late_interaction: LateInteraction, prompts: PromptStates, prompt_index: Tensor) -> None:
        self.late_interaction, self.states, self.prompt_index = late_interaction, prompts.states, prompt_index
        self.count = len(late_interaction.prompt_to_edit)
        self.form = torch.zeros(self.count, dtype=torch.long).index_copy(0, prompt_index, prompts.form.long())
        self.prompts_of_edit = _Groups(late_interaction.prompt_to_edit, late_interaction.edits)
        self.kept_tokens = _Groups(late_interaction.token_to_prompt, 2 * self.count)
        self.tokens = _Groups(prompt_index, self.count)

    def probs(self, prompts: Tensor, edits: Tensor, least: Tensor) -> Tensor:
        """Return the probability that kept prompts (b,) of one edit mean each of some edits (e,): (b, e).

        Args:
            least: probabilities (e,); what does not exceed them, or by its subject cannot, may be 0.
        """
        states = self.states.index_select(0, self.tokens.members(prompts)[0]).float()
        sizes = self.tokens.sizes[prompts].tolist()
        kept, edit_index = self.prompts_of_edit.members(edits)
        subject = self._log_probs(0, states, sizes, kept)
        close = subject >= least.log()[edit_index, None]
        some = close.any(1).nonzero().flatten()
        edit_index = edit_index[some]
        both = (subject[some] + self._log_probs(1, states, sizes, kept[some])).exp() * close[some]
        best = both.new_zeros(len(edits), len(sizes))
        return best.scatter_reduce(0, edit_index[:, None].expand_as(both), both, "amax").T

    def _log_probs(self, head: int, states: Tensor, sizes: list[int], kept: Tensor) -> Tensor:
        """Return the log-probabilities that prompts of so many tokens (b,) have the subject or relation of kept
        ones: (p, b).

        Args:
            states: of all those tokens (n, d).
        """
        late_interaction = self.late_interaction
        projection = late_interaction.proj_weight[head], late_interaction.proj_bias[head]
        projected = F.normalize(F.linear(states, *projection), dim=-1)
        rows, index = self.kept_tokens.members(kept + head * self.count)
        cosines = projected @ late_interaction.prompt_token_embeddings.index_select(0, rows).T
        near = torch.stack([part.amax(0) for part in cosines.split(sizes)])
        near *= late_interaction.token_weights.index_select(0, rows)
        scores = near.new_zeros(len(sizes), len(kept)).index_add_(1, index, near).T
        logits = late_interaction.logit_scale[head] * (scores - late_interaction.logit_offset[head])
        return F.logsigmoid(logits)

    def similar_edits(self, groups: Tensor) -> Iterator[Tensor]:
        """Yield for every edit with prompts those that have a similar subject (e,), its own number among them.

        Args:
            groups: of each kept prompt, the group of which it is compared with the others (g,); none if below nought.
        """
        edits = self.late_interaction.edits
        own = self.late_interaction.prompt_to_edit.unique()
        found = [own * edits + own]
        for group in groups[groups >= 0].unique().tolist():
            found += [asking * edits + kept for asking, kept in self._similar_in(groups == group)]
        pairs = torch.cat(found).unique()
        sizes = torch.bincount(pairs // edits, minlength=edits)
        yield from (pairs % edits).split(sizes[own].tolist())

    def _similar_in(self, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs of edits whose subjects are alike in some of the kept prompts (g,)."""
        late_interaction = self.late_interaction
        numbers = chosen.nonzero().flatten()
        owner = late_interaction.prompt_to_edit[numbers]
        rows, index = self.kept_tokens.members(numbers)
        dtype = torch.bfloat16 if has_bfloat16_tiles() else torch.float32
        embeddings = late_interaction.prompt_token_embeddings[rows].to(dtype)
        parts = list(
            zip(
                embeddings.split(_TOKENS),
                index.split(_TOKENS),
                late_interaction.token_weights[rows, None].split(_TOKENS),
                strict=True,
            )
        )
        odds = math.log(HOPELESS / (1 - HOPELESS))
        least = float(late_interaction.logit_offset[0]) + odds / float(late_interaction.logit_scale[0]) - _SLACK
        tokens, text = self.tokens.members(numbers)
        for part, states, there in padded_texts(self.states[tokens], text, len(numbers)):
            query = late_interaction.project(states, there)
            # What is not there is as the first token that is, which changes no maximum.
            columns = query.projected[0].where(query.mask[..., None], query.projected[0][:, :1]).transpose(0, 1)
            columns = columns.flatten(0, 1).T.to(embeddings.dtype)  # (k, W · B)
            scores = torch.zeros(len(numbers), len(part))
            for some, prompt, weights in parts:
                scores.index_add_(0, prompt, _highest((some @ columns).view(len(some), -1, len(part))) * weights)
            kept, asking = (scores >= least).nonzero(as_tuple=True)
            yield owner[part[asking]], owner[kept]


def _highest(cosines: Tensor) -> Tensor:
    """Return the highest of cosines (n, W, b) over W, or nought if all are less: (n, b).

    Those of few bits are compared as the whole numbers that stand for them, several times as fast: from nought on the
    order is the same.
    """
    if cosines.dtype != torch.bfloat16:
        return cosines.amax(1).clamp(min=0)
    return cosines.view(torch.int16).amax(1).clamp(min=0).view(torch.bfloat16)


class _Groups:
    """The members of groups, numbers of rows: what is asked of a few groups takes no look at all others.

    Args:
        group: of each row (n,).
        count: how many groups there are.
    """

    def __init__(self, group: Tensor, count: int) -> None:
        self.order = group.argsort(stable=True)
        self.sizes = torch.bincount(group, minlength=count)
        self.first = self.sizes.cumsum(0) - self.sizes

    def members(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of some groups, group after group, and the place of each one's group: (m,) twice."""
        sizes = self.sizes[groups]
        place = torch.arange(len(groups)).repeat_interleave(sizes)
        before = self.first[groups] - sizes.cumsum(0) + sizes
        return self.order[torch.arange(len(place)) + before[place]], place


def padded_texts(states: Tensor, text: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield texts (p,) with their tokens' states (p, W, d) and which are no padding (p, W), the shortest first."""
    tokens = _Groups(text, count)
    for part in tokens.sizes.argsort(stable=True).split(_AT_A_TIME):
        column = torch.arange(int(tokens.sizes[part].max()))
        there = column < tokens.sizes[part, None]
        place = tokens.order[(tokens.first[part, None] + column).clamp(max=len(tokens.order) - 1)]
        yield part, states[place].float(), there
