"""Finds the edits that prompts may ask, from the states of an early layer. Needs torch only; exports carry this file.

Late interaction tells how likely a prompt means each edit (:mod:`.late_interaction`); of those whose subjects it names
(:mod:`.subject_match`, :mod:`.fuzzy_match`), and whose kind of question it asks (:mod:`.question_words`), the likeliest
one is a candidate. Where the last turn alone means none, those before it may say about whom it asks, or what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
from wisecli.routing.deciding.misspelt_names import MIN_MISSPELT_PROB, read_as_meant
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.deciding.question_words import ASKED_BY, QuestionWords
from wisecli.routing.deciding.subject_match import SUBJECT_MATCH, SubjectMatch
from wisecli.routing.gating.request_gate import DEEP_GATE, REQUEST_GATE, RequestGate
from wisecli.routing.memories.answer_pairs import ANSWER_PAIRS, AnswerPairs
from wisecli.routing.memories.side_memory import Memory, SideMemory


@dataclass(frozen=True)
class FoundEdits:
    """The edits that B prompts mean by some of their tokens.

    ``decision`` opens the likeliest one of each, ``named_probs`` (B, M) say how surely prompts mean those whose subject
    they name and which their question words may ask. ``compared`` (B, W) are the tokens, ``projected`` the same under
    both projections; ``earlier`` marks those of turns before the last one among these (B, W'), if any are.
    """

    decision: Decision
    named_probs: Tensor
    compared: Tensor
    projected: ProjectedPrompts
    earlier: Tensor | None = None


@dataclass(frozen=True)
class Candidates:
    """The edits that the prompts of windows may ask: ``last_turn`` by their last turn alone; of the prompts ``rows``
    (r,), which mean none by that, ``all_turns`` together with the user's turns before it.
    """

    window: WindowStates
    last_turn: FoundEdits
    rows: Tensor
    all_turns: FoundEdits | None = None


class _Naming(NamedTuple):
    """The tokens of prompts by which it is known whom they name: those that are ``compared`` (B, T), which
    ``projected`` has under both projections; those that may name a subject (``naming``, (B, T)), and with slips
    (``fuzzy``, (B, T)); those of the ``last`` turn (B, T). ``earlier`` marks those of turns before that among the
    compared (B, W), if any are.
    """

    compared: Tensor
    projected: ProjectedPrompts
    naming: Tensor
    fuzzy: Tensor
    last: Tensor
    earlier: Tensor | None = None


class FactCandidates(Memory):
    """Edits, of which prompts may ask one or two."""

    def __init__(self, memory: SideMemory) -> None:
        super().__init__(memory)
        edits, tensors = len(memory.thresholds), memory.tensors
        self.late_interaction = LateInteraction(tensors, edits)
        self.subject_match = SubjectMatch(tensors, edits) if SUBJECT_MATCH[0] in tensors else None
        slips = self.subject_match is not None and FUZZY_MATCH[0] in tensors
        self.fuzzy_match = FuzzyMatch(tensors) if slips else None
        sorted_questions = self.fuzzy_match is not None and ASKED_BY in tensors
        self.question_words = QuestionWords(tensors) if sorted_questions else None
        self.request_gate = RequestGate(tensors) if REQUEST_GATE[0] in tensors else None
        self.deep_gate = RequestGate.deep(tensors) if DEEP_GATE[0] in tensors else None
        self.pairs = AnswerPairs(tensors) if ANSWER_PAIRS[0] in tensors else None

    def candidates(self, window: WindowStates) -> Candidates:
        """Return the edits that prompts may ask."""
        ids, non_padding, special = window.ids, window.non_padding, self.late_interaction.special_token_ids
        first = torch.zeros_like(non_padding)
        first[:, 0] = non_padding[:, 0]
        compared = compared_tokens(ids, non_padding, first, special)
        projected = self.late_interaction.project(window.states, compared)
        # Attention rests on the first token of all, which may be of the name none the less.
        fuzzy_tokens = compared_tokens(ids, non_padding, torch.zeros_like(non_padding), special)
        edit_probs = self.late_interaction.edit_probs(projected).float()
        found = self._most_likely(
            window, edit_probs, _Naming(compared, projected, non_padding, fuzzy_tokens, fuzzy_tokens)
        )
        earlier = earlier_turn_tokens(ids, non_padding, compared, special)
        rows = ((found.decision.score_ratio <= 1) & earlier.any(1)).nonzero().flatten()
        # Without a gate nothing tells what is asked from what was talked of before.
        if self.request_gate is None or not len(rows):
            return Candidates(window, found, rows[:0])
        some = WindowStates(ids[rows], non_padding[rows], window.states[rows])
        return Candidates(window, found, rows, self._in_all_turns(some, compared[rows], earlier[rows]))

    def _in_all_turns(self, window: WindowStates, last: Tensor, before: Tensor) -> FoundEdits:
        """Return the edits that prompts mean together with the user's turns before the last one.

        Args:
            last, before: the tokens of the last turn and of those (B, T).
        """
        compared = last | before
        projected = self.late_interaction.project(window.states, compared)
        in_last_turn = last.gather(1, marked_to_front(compared)[0])
        edit_probs = self.late_interaction.edit_probs(projected, in_last_turn).float()
        naming = _Naming(compared, projected, compared, compared, last, ~in_last_turn)
        return self._most_likely(window, edit_probs, naming)

    def _most_likely(self, window: WindowStates, edit_probs: Tensor, tokens: _Naming) -> FoundEdits:
        """Return the likeliest of the edits whose subjects prompts name.

        Args:
            edit_probs: how surely prompts mean each edit (B, M).
        """
        matched, fits, named_probs, projected = None, None, edit_probs, tokens.projected
        spelt: dict[tuple[int, int], ProjectedPrompts] = {}
        if self.subject_match is not None:
            matched, spelt = self._named(window.ids, edit_probs, tokens)
            if spelt:
                edit_probs = edit_probs.clone()
            for (row, edit), prompt in spelt.items():
                edit_probs[row, edit] = edit_probs[row, edit].maximum(self.late_interaction.edit_prob(prompt, edit)[0])
            named_probs = edit_probs * matched
            fits = self._fits(window.ids, named_probs, tokens)
            named_probs = named_probs if fits is None else named_probs * fits
        score_ratio, nearest = self._nearest(named_probs)
        chosen = nearest.where((score_ratio > 1) & window.non_padding.any(1), UNROUTED)
        meant = {row: spelt[row, edit] for row, edit in enumerate(nearest.tolist()) if (row, edit) in spelt}
        if meant:
            rows = torch.tensor(list(meant), device=nearest.device)
            states = torch.cat([prompt.projected for prompt in meant.values()], 1)
            projected = projected._replace(projected=projected.projected.index_copy(1, rows, states))
        decision = Decision(chosen, score_ratio, nearest, edit_probs, matched, fits)
        return FoundEdits(decision, named_probs, tokens.compared, projected, tokens.earlier)

    def _named(
        self, ids: Tensor, edit_probs: Tensor, tokens: _Naming
    ) -> tuple[Tensor, dict[tuple[int, int], ProjectedPrompts]]:
        """Return which edits' subjects prompts name (B, M), and what :func:`.read_as_meant` makes of those prompts.

        Args:
            ids: the tokens of the prompts (B, T).
            edit_probs: how surely they mean each edit (B, M).
        """
        assert self.subject_match is not None
        near = self.above_threshold(edit_probs) | (edit_probs > MIN_MISSPELT_PROB)
        matched = self.subject_match(ids, tokens.naming)
        pairs = (near & matched).nonzero(as_tuple=True)
        if len(pairs[0]):
            matched[pairs] = self.subject_match.in_one_place(ids, tokens.naming, *pairs)
        if self.fuzzy_match is None:
            return matched, {}
        letters = self.fuzzy_match.characters(ids, tokens.fuzzy)
        matched = matched | self.fuzzy_match(letters, near & ~matched)
        starts = getattr(self.request_gate, "word_starts", None)
        named = (near & matched).nonzero(as_tuple=True)
        matched[named] = self.fuzzy_match.is_whole(letters, ids, tokens.fuzzy, starts, *named)
        if tokens.earlier is not None or not len(named[0]):
            return matched, {}
        letters = self.fuzzy_match.characters(ids, tokens.compared)
        spelt = read_as_meant(tokens.projected, letters, near & matched, self.late_interaction, self.fuzzy_match)
        return matched, spelt

    def _fits(self, ids: Tensor, named_probs: Tensor, tokens: _Naming) -> Tensor | None:
        """Return which edits the question words of the last turn may ask (B, M); None where these have no say.

        Args:
            ids: the tokens of the prompts (B, T).
            named_probs: how surely they mean each edit whose subject they name (B, M).
        """
        marks = None if self.request_gate is None else self.request_gate.marks(ids)
        if self.question_words is None or self.fuzzy_match is None or marks is None:
            return None
        wanted = self.above_threshold(named_probs)
        fits: Tensor = self.question_words(self.fuzzy_match, ids, marks.ends, tokens.last, wanted)
        return fits

    def _nearest(self, edit_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score ratio (B,) and the number (B,) of the likeliest edit that opens, or else of the nearest."""
        ratios = self.score_ratios(edit_probs)
        above = ratios > 1
        nearest = (edit_probs * above).argmax(-1).where(above.any(-1), ratios.argmax(-1))
        return ratios.gather(-1, nearest[:, None])[:, 0], nearest
