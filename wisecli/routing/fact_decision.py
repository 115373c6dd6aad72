"""Which edit a prompt asks: a function of its window's token ids, by the states that they make. Needs torch only.

An edit opens where a prompt means it most surely of those whose subjects it names, and asks that: from the states of
all its tokens, by late interaction (:mod:`.meaning`), names (:mod:`.names`, :mod:`.spelling`) and what it wants with
what it mentions (:mod:`.request_gate`). Exports carry this very file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .decision import Decision, Reading
from .meaning import Asked, Meaning, looked_at, marked_first, said_before
from .names import NAMES, Names
from .prompts import UNROUTED
from .request_gate import REQUEST, RequestGate, mention_in, opens_with_word, together
from .scores import Memory, SideMemory
from .spelling import SPELLING, Spelling

# How likely a prompt must be to ask an edit that it means. What the gate says was shifted so that nearly all made-up
# questions are above this.
_ASKED = 0.5


class _Compared(NamedTuple):
    """Which tokens of what was read are compared (B, T), and those under both projections."""

    reading: Reading
    which: Tensor
    read: Asked


class FactDecision(Memory):
    """Opens the edit that a prompt asks."""

    def __init__(self, memory: SideMemory) -> None:
        super().__init__(memory)
        edits, tensors = len(memory.thresholds), memory.tensors
        self.meaning = Meaning(tensors, edits)
        self.names = Names(tensors, edits) if NAMES[0] in tensors else None
        slips = self.names is not None and SPELLING[0] in tensors
        self.spelling = Spelling(tensors) if slips else None
        self.request = RequestGate(tensors) if REQUEST[0] in tensors else None

    def decide(self, reading: Reading) -> Decision:
        """The edit that each prompt asks.

        Where the last turn alone means none, those before it may say about whom it asks, or what.
        """
        ids, real = reading.ids, reading.real
        first = torch.zeros_like(real)
        first[:, 0] = real[:, 0]
        last = looked_at(ids, real, first, self.meaning.breaks)
        read = self.meaning.read(reading.states, last)
        # Attention rests on the first token of all, which may be of the name none the less.
        spelt = looked_at(ids, real, torch.zeros_like(real), self.meaning.breaks)
        found = self._meant(reading, self.meaning.of(read).float(), real, spelt)
        if self.request is None:
            return found
        found = self._if_asked(self.request, _Compared(reading, last, read), found)
        before = said_before(ids, real, last, self.meaning.breaks)
        rows = ((found.strength <= 1) & before.any(1)).nonzero().flatten()
        if not len(rows):
            return found
        some = Reading(ids[rows], real[rows], reading.states[rows])
        return _put(found, rows, self._carried(self.request, some, last[rows], before[rows]))

    def _meant(self, reading: Reading, sure: Tensor, told: Tensor, spelt: Tensor) -> Decision:
        """The edit that prompts mean most surely, of those that they name.

        Args:
            sure: how surely prompts mean each edit (B, M).
            told: the tokens that may name its subject (B, T).
            spelt: those that may name it with a slip (B, T).
        """
        named, meant = None, sure
        if self.names is not None:
            named = self.names(reading.ids, told)
            if self.spelling is not None:
                letters = self.spelling.read(reading.ids, spelt)
                named = named | self.spelling(letters, self.beyond(sure) & ~named)
            meant = sure * named
        strength, nearest = self.strongest(meant)
        chosen = nearest.where((strength > 1) & reading.real.any(1), UNROUTED)
        return Decision(chosen, strength, nearest, sure, named)

    def _carried(self, gate: RequestGate, reading: Reading, last: Tensor, before: Tensor) -> Decision:
        """What prompts ask that their last turn says in part, and the turns of the same role before it the rest.

        Args:
            last, before: the tokens of the last turn and of those (B, T).
        """
        told = last | before
        read = self.meaning.read(reading.states, told)
        own = last.gather(1, marked_first(told)[0])
        sure = self.meaning.of(read, own).float()
        return self._if_asked(gate, _Compared(reading, told, read), self._meant(reading, sure, told, told), ~own)

    def _if_asked(
        self, gate: RequestGate, compared: _Compared, found: Decision, earlier: Tensor | None = None
    ) -> Decision:
        """A decision without the edits that prompts mention and do not ask.

        Args:
            earlier: which of the compared tokens are of turns before the last one (B, W).
        """
        reading, which, read = compared
        asked = torch.zeros(len(found.memory), device=found.memory.device)
        rows = (found.memory != UNROUTED).nonzero().flatten()
        if len(rows):
            mentions = []
            opens = opens_with_word(reading.ids, reading.real, which, self.meaning.breaks)
            for row, edit in zip(rows.tolist(), found.memory[rows].tolist(), strict=True):
                there, own = read.there[row], self.meaning.tokens_of(edit)
                marks = None if earlier is None else earlier[row, there]
                first = reading.states[row, 0].float() if opens[row] else None
                mentions.append(mention_in(read.states[row, there], read.turned[:, row, there], *own, marks, first))
            asked[rows] = gate(together(mentions), found.memory[rows]).sigmoid()
        return replace(found, memory=found.memory.where(asked > _ASKED, UNROUTED), asked=asked)


def _put(found: Decision, rows: Tensor, some: Decision) -> Decision:
    """A decision in which other ones stand for those rows of it that they open."""
    opened = some.memory != UNROUTED
    rows = rows[opened]
    parts: dict[str, Any] = {}
    for name in Decision.__dataclass_fields__:
        whole, part = getattr(found, name), getattr(some, name)
        parts[name] = whole if whole is None else whole.index_copy(0, rows, part[opened])
    return Decision(**parts)
