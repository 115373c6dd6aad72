"""Decides which edit a prompt asks for, from the states of its window of tokens. Needs torch only.

Of the edits that a prompt may ask (:mod:`.fact_candidates`) one opens if the prompt asks for it, which a gate decides
(:mod:`~wisecli.routing.gating.request_gate`). Where it does not refuse clearly, a deep gate has a say, too: it reads a
layer whose states say more of what a text is for. Exports carry this very file.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.routing.deciding.decision import AnswerTokens, Decision, WindowStates, with_rows_replaced
from wisecli.routing.deciding.fact_candidates import Candidates, FactCandidates
from wisecli.routing.deciding.late_interaction import ProjectedPrompts, starts_with_word
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.gating.gates import Gates
from wisecli.routing.gating.request_gate import Request, batch_mentions, mention_features
from wisecli.routing.gating.sentence_features import EditCosines, mention_sentences, sentence_of
from wisecli.routing.gating.two_requests import request_parts

# So many of the likeliest edits are looked at where a prompt may ask two; and how likely a part of it must be to mean
# one of those by itself.
_RIVALS, _MIN_PART_PROB = 4, 0.5
# So many of a prompt's sentences are looked at, those that have an edit best, where several may mention it; and what a
# prompt begins or ends with is so many tokens. A mention there is looked at in several ways, and two edits each in its
# part: each of these must be asked as likely as this, and their mean above even odds.
_MENTIONS, _EDGE, _MIN_EACH_PROB = 3, 12, 0.3


class _ComparedTokens(NamedTuple):
    """The tokens ``ids`` (B, W) of windows, the mask of those that are no padding, and the states that gates read of
    them: of the router's layer (B, W, d), or of that and behind them those of the deep gate's (B, W, 2 · d).

    ``compared`` (B, W) marks those that are compared, which ``projected`` has under both projections; ``earlier``
    (B, W') those of turns before the last one among these, if any are.
    """

    ids: Tensor
    non_padding: Tensor
    states: Tensor
    compared: Tensor
    projected: ProjectedPrompts
    earlier: Tensor | None = None


class _Asked(NamedTuple):
    """An edit that a prompt may ask: the prompt's row, the edit's number, and how likely the prompt means it; ``part``
    marks those of the compared tokens that may ask it (n,), all by default.
    """

    row: int
    edit: int
    edit_prob: float
    part: Tensor | None = None


class FactDecision(FactCandidates):
    """Opens the edit that a prompt asks."""

    def numbers(self, decision: Decision) -> Tensor:
        """Return the edit, or the pair of edits, that answers each prompt as one number: (B,)."""
        if self.pairs is None or decision.second is None:
            return decision.memory
        return self.pairs.numbers(decision.memory, decision.second)

    def in_turn(self, numbers: Tensor, tokens: AnswerTokens) -> Tensor:
        """Return what answers each token of a pass (B, T), of a pair one edit behind the other."""
        if self.pairs is None:
            return numbers
        separator = self.pairs.separator_token_id.to(tokens.ids.device)
        here = tokens.in_answer & (tokens.ids == separator) & (numbers >= 0)
        return self.pairs.in_turn(numbers, here.long().cumsum(1), here)

    def decide(self, window: WindowStates) -> Decision:
        """Return the edit that each prompt asks for, or of a memory with a deep gate the one that it may ask for."""
        return self.asked(self.candidates(window))

    def asked(self, candidates: Candidates, deep_states: Tensor | None = None) -> Decision:
        """Return the edit that each prompt asks for, of those that it may ask.

        Args:
            deep_states: what the deep gate reads of the windows (B, W, d). Without them an edit opens which that may
                let through.
        """
        window, found, rows = candidates.window, candidates.last_turn, candidates.rows
        if self.request_gate is None:
            return found.decision
        states = window.states if deep_states is None else torch.cat([window.states, deep_states], -1)
        gates = Gates(self.request_gate, self.deep_gate, deep_states is not None)
        tokens = _ComparedTokens(window.ids, window.non_padding, states, found.compared, found.projected)
        decision = self._without_unasked(gates, tokens, found.decision)
        if self.pairs is not None:
            may_open = self.above_threshold(found.named_probs) * self.pairs.usable
            decision = self._with_pairs(gates, tokens, decision, found.named_probs * may_open)
        if candidates.all_turns is None:
            return decision
        together = candidates.all_turns
        some = (window.ids[rows], window.non_padding[rows], states[rows])
        tokens = _ComparedTokens(*some, together.compared, together.projected, together.earlier)
        return with_rows_replaced(decision, rows, self._without_unasked(gates, tokens, together.decision))

    def _without_unasked(self, gates: Gates, tokens: _ComparedTokens, decision: Decision) -> Decision:
        """Return a decision without the edits that prompts mention but do not ask for."""
        ask_probs = torch.zeros(len(decision.memory), device=decision.memory.device)
        rows = (decision.memory != UNROUTED).nonzero().flatten()
        edits = decision.memory[rows]
        probs = decision.scores[rows, edits].tolist()
        asked = [_Asked(*one) for one in zip(rows.tolist(), edits.tolist(), probs, strict=True)]
        ask_probs[rows] = self._ask_probs(gates, tokens, asked)
        refused = [one for one in asked if ask_probs[one.row] <= gates.bar and tokens.earlier is None]
        for one in refused:
            each = self._ask_probs(gates, tokens, self._mention_at_edge(gates, tokens, one))
            ask_probs[one.row] = torch.maximum(ask_probs[one.row], _joint_prob(each))
        return replace(decision, memory=decision.memory.where(ask_probs > gates.bar, UNROUTED), ask_prob=ask_probs)

    def _mention_at_edge(self, gates: Gates, tokens: _ComparedTokens, one: _Asked) -> list[_Asked]:
        """Return the parts of a prompt that may ask an edit which several of its sentences mention, as a text and a
        question behind it do: the last of these, if the prompt ends there, or else the first, if it begins there, with
        all that mentions nothing, with the sentence before it, and by itself. Other prompts have no such part.
        """
        found = self._sentences(gates, tokens, one.row, torch.tensor([one.edit], device=tokens.ids.device))
        if found is None:
            return []
        cosines, sentence = found
        subject, relation = cosines.group_matches(sentence[None], int(sentence.max()) + 1)
        best = (subject + relation)[0].topk(min(_MENTIONS, subject.shape[1])).indices.sort().values
        probs = [self._part_prob(tokens.projected, one.row, one.edit, sentence == place) for place in best.tolist()]
        mentions = best[torch.tensor(probs, device=best.device) > _MIN_PART_PROB]
        at_end, at_start = (torch.isin(mentions, edge) for edge in (sentence[-_EDGE:], sentence[:_EDGE]))
        if len(mentions) < 2 or not (at_end[-1] or at_start[0]):
            return []
        kept = mentions[-1 if at_end[-1] else 0]
        without_others = ~torch.isin(sentence, mentions[mentions != kept])
        # What is to be done with the sentence may stand in the one before it.
        near = without_others & (sentence <= kept) & (sentence >= kept - 1)
        return [one._replace(part=part) for part in (without_others, near, sentence == kept)]

    def _sentences(
        self, gates: Gates, tokens: _ComparedTokens, row: int, edits: Tensor
    ) -> tuple[EditCosines, Tensor] | None:
        """Return the cosines of a prompt's tokens with those of edits (e,), and the number of each token's sentence
        (n,); None if the gate heeds no sentences.
        """
        marks = gates.first.marks(tokens.ids[row, tokens.compared[row]])
        if marks is None:
            return None
        own = tokens.projected.projected[:, row, tokens.projected.mask[row]]
        cosines = EditCosines.of([own] * len(edits), self.late_interaction.edit_tokens(edits))
        return cosines, sentence_of(marks.ends[None], torch.zeros_like(cosines.mask[:1]))[0]

    def _with_pairs(self, gates: Gates, tokens: _ComparedTokens, decision: Decision, named_probs: Tensor) -> Decision:
        """Return a decision in which prompts that ask two edits, each in a part of its own, open both.

        Args:
            named_probs: how surely prompts mean each edit that may open, 0 for the others (B, M).
        """
        memory, second = decision.memory.clone(), torch.full_like(decision.memory, UNROUTED)
        ask_prob = torch.zeros(len(memory), device=memory.device) if decision.ask_prob is None else decision.ask_prob
        for row in ((named_probs > 0).sum(1) > 1).nonzero().flatten().tolist():
            pair = self._pair(gates, tokens, row, named_probs[row])
            # Who asks one of two things is likely to ask the other.
            prob = _joint_prob(self._ask_probs(gates, tokens, pair))
            if bool(prob > gates.bar):
                memory[row], second[row] = pair[0].edit, pair[1].edit
                ask_prob = ask_prob.index_fill(0, torch.tensor(row, device=memory.device), float(prob))
        return replace(decision, memory=memory, second=second, ask_prob=ask_prob)

    def _pair(self, gates: Gates, tokens: _ComparedTokens, row: int, named_probs: Tensor) -> tuple[_Asked, ...]:
        """Return the likeliest edit (M,) and the likeliest that another part of a prompt means, in the order in which
        they are mentioned, each with its part; none if there is no other.
        """
        edits = named_probs.topk(min(_RIVALS, int((named_probs > 0).sum()))).indices
        found = self._sentences(gates, tokens, row, edits)
        if found is None:
            return ()
        cosines, sentence = found
        mentions = mention_sentences(cosines, sentence.expand_as(cosines.mask))
        best, *others = edits.tolist()
        for place, edit in enumerate(others, 1):
            of_both = cosines.of_request(0), cosines.of_request(place)
            parts = request_parts(of_both, (mentions[0], mentions[place]), sentence)
            pair = tuple(
                _Asked(row, one, self._part_prob(tokens.projected, row, one, part), part)
                for one, part in ((best, parts.first), (edit, parts.second))
            )
            if all(one.edit_prob > _MIN_PART_PROB for one in pair):
                return pair if parts.in_order else pair[::-1]
        return ()

    def _part_prob(self, prompts: ProjectedPrompts, row: int, edit: int, part: Tensor) -> float:
        """Return how likely a part of a prompt (n,) means an edit by itself; 0 if that is not above its threshold."""
        mask = prompts.mask[row : row + 1].clone()
        mask[0, mask[0].clone()] = part
        alone = ProjectedPrompts(prompts.projected[:, row : row + 1], mask)
        prob = float(self.late_interaction.edit_prob(alone, edit))
        return prob if prob > self.thresholds[edit] else 0.0

    def _ask_probs(self, gates: Gates, tokens: _ComparedTokens, asked: Sequence[_Asked]) -> Tensor:
        """Return how surely prompts ask edits: (a,)."""
        ids, compared, projected = tokens.ids, tokens.compared, tokens.projected
        if not asked:
            return torch.zeros(0, device=ids.device)
        requests = []
        opens = starts_with_word(ids, tokens.non_padding, compared, self.late_interaction.special_token_ids)
        edits = torch.tensor([one.edit for one in asked], device=ids.device)
        for (row, _, _, part), own in zip(asked, self.late_interaction.edit_tokens(edits), strict=True):
            states, own_ids = tokens.states[row, compared[row]].float(), ids[row, compared[row]]
            kept = projected.mask[row]
            both = projected.projected[:, row, kept]
            before = None if tokens.earlier is None else tokens.earlier[row, kept]
            if part is not None:
                states, both, own_ids = states[part], both[:, part], own_ids[part]
            first = tokens.states[row, 0].float() if opens[row] else None
            requests.append(Request(states, both, own, before, first, gates.first.marks(own_ids)))
        probs = torch.tensor([one.edit_prob for one in asked], device=ids.device)
        return gates.ask_probs(batch_mentions(mention_features(requests)), edits, probs)


def _joint_prob(each: Tensor) -> Tensor:
    """Return the mean of how surely parts of a prompt ask their edits (p,), or the least if too low; 0 without any."""
    if not len(each):
        return each.new_zeros(())
    return each.mean() if bool((each > _MIN_EACH_PROB).all()) else each.min()
