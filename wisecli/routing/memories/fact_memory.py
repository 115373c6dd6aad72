"""The default memory, a lookup: the nearest key of the edit that was decided adds its residual. Needs torch only.

    y = W a + b + v_i    the residual v_i of that of the edit's keys which is nearest to a, by whitened cosine

Inside an answer the token itself says which keys may be meant, if one of the edit's own answers has it at this place.

Where a prompt asks two edits, they answer one after the other (:mod:`.answer_pairs`).

Exports carry this very file.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.routing.deciding.decision import AnswerTokens, TokenChoices
from wisecli.routing.deciding.fact_decision import FactDecision
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.memories.answer_pairs import AnswerPairs

# The whitening of keys inside answers; those that prompts end in have others.
ANSWER_WHITENING = 1
# How near a key inside an answer must come once a prompt has opened an edit.
ANSWER_KEY_MIN_COSINE = 0.3
# How near one must come to a prompt's last token for the prompt to end inside its answer.
_BEGUN_MIN_COSINE = 0.8


class RoutingKeys(nn.Module):
    """The keys of edits, each seen through a whitening of its own; the tensors are those of a lookup."""

    whitened_keys: Tensor
    key_scales: Tensor
    key_to_edit: Tensor
    cosine_offset: Tensor
    whitening_index: Tensor
    directions: Tensor
    gains: Tensor
    floors: Tensor

    def cosines(self, keys: Tensor, key_indices: Tensor) -> Tensor:
        """Return the whitened cosine of every key with some routing keys: (..., d_ff) → (..., n).

        Args:
            key_indices: the routing keys that are wanted (n,).
        """
        wide = keys.float()  # squared norms of keys overflow half precision
        norms = self.whitened_norms(wide)[..., self.whitening_index[key_indices]]
        stored = self.whitened_keys[key_indices]
        scores = F.linear(wide, stored.float())
        if not stored.is_floating_point():
            scores = scores * self.key_scales[key_indices]
        return scores / norms + self.cosine_offset[key_indices].float()

    def nearest_keys(self, keys: Tensor, edits: Tensor, tokens: AnswerTokens) -> tuple[Tensor, Tensor]:
        """Return the cosine and the index of the nearest key of one edit each: keys (m, d_ff), edits (m,) → two (m,).

        A prompt may end inside its answer ("… Answer: New"). There the key of a prompt's last token comes near a key
        inside the answer, as no other prompt's does, and the answer goes on.

        Args:
            tokens: those of the keys (m,). One that comes after its prompt's last token is compared with such alone,
                and if an answer of its edit has the very token at its place, with its keys there; the cosine is then 1.
        """
        key_indices = torch.isin(self.key_to_edit, edits).nonzero().flatten()
        other = self.key_to_edit[key_indices] != edits[:, None]
        inside = self.whitening_index[key_indices] == ANSWER_WHITENING
        cosines = self.cosines(keys, key_indices).masked_fill(other, -torch.inf)
        cosine, at = cosines.masked_fill(inside != tokens.in_answer[:, None], -torch.inf).max(-1)
        begun, begun_at = cosines.masked_fill(~inside, -torch.inf).max(-1)
        goes_on = (begun > _BEGUN_MIN_COSINE) & (begun > cosine)
        cosine, at = begun.where(goes_on, cosine), begun_at.where(goes_on, at)
        same = self._same_token(tokens, key_indices)
        if same is not None:
            same_cosine, same_at = cosines.masked_fill(~same, -torch.inf).max(-1)
            found = same_cosine > -torch.inf
            cosine, at = cosine.where(~found, 1.0), same_at.where(found, at)
        return cosine, key_indices[at]

    def _same_token(self, tokens: AnswerTokens, key_indices: Tensor) -> Tensor | None:
        """Return which of some routing keys (n,) were read at each token's (m,) place of an answer with the same one
        there: (m, n). ``None`` if nothing is known of keys' tokens.
        """
        token_of, place_of = (getattr(self, name, None) for name in ("key_to_token", "key_to_place"))
        if token_of is None or place_of is None:
            return None
        place = place_of[key_indices]
        same: Tensor = (place > 0) & (place == tokens.place[:, None]) & (token_of[key_indices] == tokens.ids[:, None])
        return same

    def whitened_norms(self, keys: Tensor) -> Tensor:
        """Return ``√(aᵀP a)`` of every key under every whitening: (..., d_ff) → (..., w)."""
        along = F.linear(keys, self.directions.flatten(0, 1).to(keys.dtype)).unflatten(-1, self.gains.shape)
        energy = keys.square().sum(-1, keepdim=True)
        spread = self.floors * energy + (along.square() * self.gains).sum(-1)
        # Of a key along a leading direction, such as an attention sink's, the sum leaves but its rounding error.
        least = (self.floors + self.gains.amin(-1)).clamp(min=0) * energy
        lengths: Tensor = spread.maximum(least).clamp(min=1e-12).sqrt()
        return lengths


class FactMemory(FactDecision, RoutingKeys):
    """Edits, each with the keys at which it answers and the residuals that it adds there.

    What is chosen for a token is one of its n keys, or what a pair of edits does
    (:meth:`AnswerPairs.actions`) plus n.
    """

    kind = "lookup"

    residuals: Tensor
    key_to_residual: Tensor

    def choices(self, keys: Tensor, answered: Tensor, tokens: AnswerTokens) -> TokenChoices:
        """Return the nearest of the decided edit's own keys at each token.

        Behind a prompt's last token a key must come near one of those, or its token be that of the edit's answer there,
        or the answer is over.
        """
        score_ratio = torch.zeros(answered.shape, device=keys.device)
        nearest = torch.full_like(answered, UNROUTED)
        chosen = nearest.clone()
        rows, columns = (answered != UNROUTED).nonzero(as_tuple=True)
        if len(rows):
            numbers, own_tokens = answered[rows, columns], tokens[rows, columns]
            edits = numbers if self.pairs is None else self.pairs.edits(numbers)
            cosine, key_index = self.nearest_keys(keys[rows, columns], edits, own_tokens)
            own = key_index.where(~own_tokens.in_answer | (cosine > ANSWER_KEY_MIN_COSINE), UNROUTED)
            nearest[rows, columns] = key_index
            chosen[rows, columns] = own if self.pairs is None else self._in_pairs(self.pairs, own, numbers)
            score_ratio[rows, columns] = cosine / ANSWER_KEY_MIN_COSINE
        return TokenChoices(chosen, score_ratio, nearest)

    def _in_pairs(self, pairs: AnswerPairs, chosen: Tensor, numbers: Tensor) -> Tensor:
        """Return choices (t,) with what pairs of edits do in their place, by what answers each token (t,)."""
        residual = self.key_to_residual[chosen.clamp(min=0)].where(chosen != UNROUTED, UNROUTED)
        actions = pairs.actions(numbers, residual)
        return chosen.where(actions < 0, len(self.key_to_residual) + actions)

    def add(self, answer: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:  # noqa: ARG002 (of the interface)
        """Add to every token the residual that was chosen for it."""
        count = len(self.key_to_residual)
        index = self.key_to_residual[chosen.clamp(0, count - 1)]
        if self.pairs is not None:
            index = index.where(chosen < count, self.pairs.residuals_of((chosen - count).clamp(min=0)))
        update = self.residuals[index].to(answer.dtype)
        return torch.where((chosen != UNROUTED)[..., None], answer + update, answer)

    def memory_of_choice(self, chosen: Tensor) -> Tensor:
        """Return the edit that each choice belongs to: (...) → (...)."""
        count = len(self.key_to_edit)
        edit = self.key_to_edit[chosen.clamp(0, count - 1)].where(chosen != UNROUTED, UNROUTED)
        return edit.where(chosen < count, (chosen - count) % len(self.thresholds))
