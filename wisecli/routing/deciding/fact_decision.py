"""Decides which edit a prompt asks for, from the states of its window of tokens. Needs torch only.

Of the edits whose subjects a prompt names (:mod:`.subject_match`, :mod:`.fuzzy_match`) the likeliest one opens if the
prompt asks for it. Late interaction tells how likely each is (:mod:`.late_interaction`), and a gate whether the prompt
asks for what it mentions (:mod:`.request_gate`). Exports carry this very file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wisecli.routing.deciding.decision import Decision, WindowStates
from wisecli.routing.deciding.fuzzy_match import FUZZY_MATCH, FuzzyMatch
from wisecli.routing.deciding.late_interaction import (
    LateInteraction,
    ProjectedPrompts,
    compared_tokens,
    earlier_turn_tokens,
    marked_to_front,
)
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.deciding.request_gate import (
    REQUEST_GATE,
    RequestGate,
    batch_mentions,
    mention_features,
    starts_with_word,
)
from wisecli.routing.deciding.subject_match import SUBJECT_MATCH, SubjectMatch
from wisecli.routing.memories.side_memory import Memory, SideMemory

# How likely a prompt must be to ask an edit that it means. What the gate says was shifted so that nearly all made-up
# questions are above this.
MIN_ASK_PROB = 0.5


class _ComparedTokens(NamedTuple):
    """Which tokens of what was read are compared (B, T), and those under both projections."""

    window: WindowStates
    mask: Tensor
    projected: ProjectedPrompts


class FactDecision(Memory):
    """Opens the edit that a prompt asks."""

    def __init__(self, memory: SideMemory) -> None:
        super().__init__(memory)
        edits, tensors = len(memory.thresholds), memory.tensors
        self.late_interaction = LateInteraction(tensors, edits)
        self.subject_match = SubjectMatch(tensors, edits) if SUBJECT_MATCH[0] in tensors else None
        slips = self.subject_match is not None and FUZZY_MATCH[0] in tensors
        self.fuzzy_match = FuzzyMatch(tensors) if slips else None
        self.request_gate = RequestGate(tensors) if REQUEST_GATE[0] in tensors else None

    def decide(self, window: WindowStates) -> Decision:
        """Return the edit that each prompt asks for.

        Where the last turn alone means none, those before it may say about whom it asks, or what.
        """
        ids, non_padding = window.ids, window.non_padding
        first = torch.zeros_like(non_padding)
        first[:, 0] = non_padding[:, 0]
        compared = compared_tokens(ids, non_padding, first, self.late_interaction.special_token_ids)
        projected = self.late_interaction.project(window.states, compared)
        # Attention rests on the first token of all, which may be of the name none the less.
        fuzzy_tokens = compared_tokens(
            ids, non_padding, torch.zeros_like(non_padding), self.late_interaction.special_token_ids
        )
        decision = self._most_likely(
            window, self.late_interaction.edit_probs(projected).float(), non_padding, fuzzy_tokens
        )
        if self.request_gate is None:
            return decision
        decision = self._without_unasked(self.request_gate, _ComparedTokens(window, compared, projected), decision)
        earlier = earlier_turn_tokens(ids, non_padding, compared, self.late_interaction.special_token_ids)
        rows = ((decision.score_ratio <= 1) & earlier.any(1)).nonzero().flatten()
        if not len(rows):
            return decision
        some = WindowStates(ids[rows], non_padding[rows], window.states[rows])
        return _with_rows_replaced(
            decision, rows, self._with_earlier_turns(self.request_gate, some, compared[rows], earlier[rows])
        )

    def _most_likely(
        self, window: WindowStates, edit_probs: Tensor, naming_tokens: Tensor, fuzzy_tokens: Tensor
    ) -> Decision:
        """Return the likeliest of the edits whose subjects each prompt names.

        Args:
            edit_probs: how surely prompts mean each edit (B, M).
            naming_tokens: the tokens that may name its subject (B, T).
            fuzzy_tokens: those that may name it with a slip (B, T).
        """
        matched, gated_edit_probs = None, edit_probs
        if self.subject_match is not None:
            meant, matched = self.above_threshold(edit_probs), self.subject_match(window.ids, naming_tokens)
            pairs = (meant & matched).nonzero(as_tuple=True)
            if len(pairs[0]):
                matched[pairs] = self.subject_match.in_one_place(window.ids, naming_tokens, *pairs)
            if self.fuzzy_match is not None:
                letters = self.fuzzy_match.characters(window.ids, fuzzy_tokens)
                matched = matched | self.fuzzy_match(letters, meant & ~matched)
            gated_edit_probs = edit_probs * matched
        score_ratio, nearest = self.best_score_ratio(gated_edit_probs)
        chosen = nearest.where((score_ratio > 1) & window.non_padding.any(1), UNROUTED)
        return Decision(chosen, score_ratio, nearest, edit_probs, matched)

    def _with_earlier_turns(self, gate: RequestGate, window: WindowStates, last: Tensor, before: Tensor) -> Decision:
        """Return what prompts ask for together with the user's turns before the last one.

        Args:
            last, before: the tokens of the last turn and of those (B, T).
        """
        compared = last | before
        projected = self.late_interaction.project(window.states, compared)
        in_last_turn = last.gather(1, marked_to_front(compared)[0])
        edit_probs = self.late_interaction.edit_probs(projected, in_last_turn).float()
        return self._without_unasked(
            gate,
            _ComparedTokens(window, compared, projected),
            self._most_likely(window, edit_probs, compared, compared),
            ~in_last_turn,
        )

    def _without_unasked(
        self, gate: RequestGate, compared: _ComparedTokens, decision: Decision, earlier: Tensor | None = None
    ) -> Decision:
        """Return a decision without the edits that prompts mention but do not ask for.

        Args:
            earlier: which of the compared tokens are of turns before the last one (B, W).
        """
        window, mask, projected = compared
        ask_probs = torch.zeros(len(decision.memory), device=decision.memory.device)
        rows = (decision.memory != UNROUTED).nonzero().flatten()
        if len(rows):
            mentions = []
            opens = starts_with_word(window.ids, window.non_padding, mask, self.late_interaction.special_token_ids)
            edit_tokens = self.late_interaction.edit_tokens(decision.memory[rows])
            for row, own in zip(rows.tolist(), edit_tokens, strict=True):
                tokens = projected.mask[row]
                in_earlier_turn = None if earlier is None else earlier[row, tokens]
                first = window.states[row, 0].float() if opens[row] else None
                mentions.append(
                    mention_features(
                        projected.states[row, tokens],
                        projected.projected[:, row, tokens],
                        own,
                        earlier=in_earlier_turn,
                        first_state=first,
                        marks=gate.marks(window.ids[row, mask[row]]),
                    )
                )
            ask_probs[rows] = gate(batch_mentions(mentions), decision.memory[rows]).sigmoid()
        return replace(decision, memory=decision.memory.where(ask_probs > MIN_ASK_PROB, UNROUTED), ask_prob=ask_probs)


def _with_rows_replaced(decision: Decision, rows: Tensor, replacements: Decision) -> Decision:
    """Return a decision with some rows replaced, where the replacements open an edit."""
    opened = replacements.memory != UNROUTED
    rows = rows[opened]
    parts: dict[str, Any] = {}
    for name in Decision.__dataclass_fields__:
        whole, part = getattr(decision, name), getattr(replacements, name)
        parts[name] = whole if whole is None else whole.index_copy(0, rows, part[opened])
    return Decision(**parts)
