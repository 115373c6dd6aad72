"""Compares the prompts of many edits with each other, exactly only those with similar subjects.

Thousands of edits are compared with each other, and hardly any two are alike. So subjects are compared first with as
few bits as this processor is quicker with, and prompts with those in the same form alone: names that are alike in any
two forms are nearly as alike in one. Those that are alike are compared in all forms, again with few bits first.
"""

import math
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.memory.merging.quick_cosines import QuickVectors, highest_in_parts
from wisecli.models.running.grouped_rows import rows_of
from wisecli.routing.deciding.late_interaction import HOPELESS, LateInteraction

# Prompts that are compared at a time; products have a multiple of so many rows, as few are added up otherwise.
_AT_A_TIME, _ROWS = 64, 64
# How much less alike than would do two subjects in one form may be, and two that are compared with few bits.
_SLACK, _FEW_BITS = 0.052, 0.02


class NearPrompts:
    """The kept prompts of a memory, compared with each other.

    Args:
        late_interaction: that of the memory; kept prompts are in order of their edits.
        projected: the tokens of those prompts under both projections, of length 1 (2, n, k).
        prompt_index: the kept prompt that each token is of (n,), ascending.
    """

    def __init__(self, late_interaction: LateInteraction, projected: Tensor, prompt_index: Tensor) -> None:
        self.late_interaction, self.projected = late_interaction, projected
        self.count = len(late_interaction.prompt_to_edit)
        self.prompts_of_edit = Groups(late_interaction.prompt_to_edit, late_interaction.edits)
        self.kept_tokens = Groups(late_interaction.token_to_prompt, 2 * self.count)
        self.tokens = Groups(prompt_index, self.count)
        parts = self.tokens.sizes.split(self.prompts_of_edit.sizes.tolist())
        self.sizes_of_edit = [part.tolist() for part in parts]
        self.first_of_edit = [0, *accumulate(map(sum, self.sizes_of_edit))]
        # Tokens of subjects come first among those that are kept.
        subjects = int((late_interaction.token_to_prompt < self.count).sum())
        self.quick = QuickVectors.of(projected[0])
        self.quick_kept = QuickVectors.of(late_interaction.prompt_token_embeddings[:subjects])

    def probs(self, asking: Tensor, meant: Tensor, least: Tensor) -> Tensor:
        """Return the probability that each prompt of some edits means another edit (p, F), 0 where an edit has fewer
        prompts.

        Args:
            asking, meant: the pairs of edits (p,), ascending by the first.
            least: probabilities (p,); what does not exceed them, or by its subject cannot, may be 0.
        """
        kept, pair = self.prompts_of_edit.members(meant)
        if self.quick.few_bits:
            possible = self._log_probs(0, asking[pair], kept, few_bits=True) >= least.log()[pair, None]
            kept, pair = (part[possible.any(1)] for part in (kept, pair))
        subject = self._log_probs(0, asking[pair], kept)
        close = subject >= least.log()[pair, None]
        rows = close.any(1).nonzero().flatten()
        both = (subject[rows] + self._log_probs(1, asking[pair[rows]], kept[rows])).exp() * close[rows]
        probs = both.new_zeros(len(asking), both.shape[1])
        return probs.scatter_reduce(0, pair[rows, None].expand_as(both), both, "amax")

    def _log_probs(self, head: int, asking: Tensor, kept: Tensor, *, few_bits: bool = False) -> Tensor:
        """Return the log-probabilities that prompts of edits (p,), ascending, have the subject or relation of kept ones
        (p,): (p, F).

        Args:
            few_bits: whether those of subjects may be somewhat too high, and none too low.
        """
        late_interaction = self.late_interaction
        rows, place = self.kept_tokens.members(kept + head * self.count)
        edits, counts = asking[place].unique_consecutive(return_counts=True)
        # The highest cosine of each of those tokens with every prompt; it stays where an edit has fewer prompts.
        near, start = torch.full((int(self.prompts_of_edit.sizes.max()), len(rows)), -torch.inf), 0
        unit = 1.0
        for edit, token_rows in zip(edits.tolist(), rows.split(counts.tolist()), strict=True):
            tokens = slice(*self.first_of_edit[edit : edit + 2])
            if few_bits:
                cosines, unit = self.quick.rows(tokens).cosines(self.quick_kept.rows(token_rows))
            else:
                embeddings = F.embedding(
                    F.pad(token_rows, (0, -len(token_rows) % _ROWS)), late_interaction.prompt_token_embeddings
                )
                cosines = (self.projected[head, tokens] @ embeddings.T)[:, : len(token_rows)]
            for form, part in enumerate(cosines.split(self.sizes_of_edit[edit])):
                near[form, start : start + len(token_rows)] = part.amax(0)
            start += len(token_rows)
        near *= late_interaction.token_weights[rows] * unit
        scores = near.new_zeros(len(near), len(kept)).index_add_(1, place, near).T
        if few_bits:
            scores += _FEW_BITS
        return F.logsigmoid(late_interaction.logit_scale[head] * (scores - late_interaction.logit_offset[head]))

    def similar_edits(self, groups: Tensor, *, beside: int = 0) -> tuple[Tensor, Tensor]:
        """Return the pairs of edits with similar subjects (p,) twice, ascending; each edit with prompts is one with
        itself.

        Args:
            groups: of each kept prompt, the group of which it is compared with the others (g,); none if negative.
            beside: the first of those edits of which one must be in every pair.
        """
        edits = self.late_interaction.edits
        own = self.late_interaction.prompt_to_edit.unique()
        own = own[own >= beside]
        found = [own * edits + own]
        for group in groups[groups >= 0].unique().tolist():
            numbers = (groups == group).nonzero().flatten()
            later = self.late_interaction.prompt_to_edit[numbers] >= beside
            found += [asking * edits + kept for asking, kept in self._similar(numbers, numbers[later])]
            found += [asking * edits + kept for asking, kept in self._similar(numbers[later], numbers[~later])]
        pairs = torch.cat(found).unique()
        return pairs // edits, pairs % edits

    def _similar(self, asking: Tensor, kept: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs of edits of which prompts (a,) of the first have subjects like those of prompts (b,) of the
        second.
        """
        if not len(kept) or not len(asking):
            return
        late_interaction = self.late_interaction
        rows, index = self.kept_tokens.members(kept)
        embeddings, weights = self.quick_kept.rows(rows), late_interaction.token_weights[rows, None]
        odds = math.log(HOPELESS / (1 - HOPELESS))
        least = float(late_interaction.logit_offset[0]) + odds / float(late_interaction.logit_scale[0]) - _SLACK
        for part in asking[self.tokens.sizes[asking].argsort(stable=True)].split(_AT_A_TIME):
            columns = self.quick.rows(self.tokens.padded(part)[0].T.flatten())  # W · B
            scores = torch.zeros(len(kept), len(part))
            for indices, highest in highest_in_parts(embeddings, columns, len(part)):
                scores.index_add_(0, index[indices], highest * weights[indices])
            near, place = (scores >= least).nonzero(as_tuple=True)
            yield late_interaction.prompt_to_edit[part[place]], late_interaction.prompt_to_edit[kept[near]]


class Groups:
    """The members of groups: rows by their numbers, of which those of a few groups are found without a look at the
    others.

    Args:
        group: of each row (n,).
        count: how many groups there are.
    """

    def __init__(self, group: Tensor, count: int) -> None:
        self.order = group.argsort(stable=True)
        self.sizes = torch.bincount(group, minlength=count)
        self.first = self.sizes.cumsum(0) - self.sizes

    def members(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of some groups, group after group, and the index of each row's group: (m,) twice."""
        rows, index = rows_of(groups, self.sizes)
        return self.order[rows], index

    def padded(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of some groups (...), W of each, and which of them are no padding: (..., W) twice.

        The row of padding is the group's first, which changes no maximum; that of a group without rows is any.
        """
        sizes = self.sizes[groups][..., None]
        place = torch.arange(max(1, int(sizes.max())) if sizes.numel() else 1)
        there = place < sizes
        first = self.first[groups][..., None]
        return self.order[(first + place).where(there, first).clamp(max=len(self.order) - 1)], there
