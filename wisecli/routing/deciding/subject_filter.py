"""Tell prompts that no edit can answer by their token ids, so that no layer runs to decide them. Needs torch only.

An edit answers prompts that name its subject, as it is written or with slips. A word and the same word with a slip have
in common what is left when one letter of each is taken out. So the words of a prompt are looked up among those of
all subjects with a letter less, by hashes: what is found holds every prompt that the memory would open, and few others.
"""

import torch
from torch import Tensor

from wisecli.routing.deciding.fact_decision import FactDecision
from wisecli.routing.deciding.fuzzy_match import MIN_ANY_SLIP, MIN_FUZZY_LENGTH, FuzzyMatch
from wisecli.routing.deciding.late_interaction import compared_tokens, earlier_turn_tokens
from wisecli.routing.deciding.prompt_words import WORD_CHARS, has_digits, split_words, word_hashes
from wisecli.routing.memories.side_memory import Memory

# Which letters of a word of four are where once one is typed twice, or two have changed places; the fifth is none.
_SHORT_SLIPS = torch.tensor([
    *([0, 0, 1, 2, 3], [0, 1, 1, 2, 3], [0, 1, 2, 2, 3], [0, 1, 2, 3, 3]),
    *([1, 0, 2, 3, 4], [0, 2, 1, 3, 4], [0, 1, 3, 2, 4]),
])  # fmt: skip


class SubjectFilter:
    """Which prompts may open an edit of a memory.

    Args:
        memory: in its place; of one that does not look for names every prompt may.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory if isinstance(memory, FactDecision) and memory.subject_match is not None else None
        spelling = None if self._memory is None else self._memory.fuzzy_match
        self._slips = None if spelling is None else _SlipFilter(spelling)

    def __call__(self, ids: Tensor, non_padding: Tensor) -> list[bool]:
        """Return of windows of token ids (B, W), and which of them are no padding (B, W), whether each may open one."""
        memory = self._memory
        if memory is None or memory.subject_match is None:
            return [True] * len(ids)
        may: list[bool] = memory.subject_match(ids, non_padding).any(1).tolist()
        if self._slips is None or memory.fuzzy_match is None or all(may):
            return may
        for compared in _compared(memory, ids, non_padding):
            letters = memory.fuzzy_match.characters(ids, compared)
            may = [known or self._slips(row) for known, row in zip(may, split_words(letters), strict=True)]
        return may


def _compared(memory: FactDecision, ids: Tensor, non_padding: Tensor) -> list[Tensor]:
    """Return the tokens (B, W) among which misspelt names are looked for: at first, and where earlier turns count."""
    breaks, first = memory.late_interaction.special_token_ids, torch.zeros_like(non_padding)
    alone = compared_tokens(ids, non_padding, first, breaks)
    first[:, 0] = non_padding[:, 0]
    last = compared_tokens(ids, non_padding, first, breaks)
    earlier = earlier_turn_tokens(ids, non_padding, last, breaks)
    return [alone, last | earlier] if bool(earlier.any()) else [alone]


class _SlipFilter:
    """Whether words may name an edit's subject, of which each may have a slip."""

    def __init__(self, spelling: FuzzyMatch) -> None:
        words = spelling.subject_words
        length, digits = (words > 0).sum(1), has_digits(words)
        slips, short = (length >= MIN_ANY_SLIP) & ~digits, (length == MIN_FUZZY_LENGTH) & ~digits
        self._exact = word_hashes(words)
        self._short, self._short_word = word_hashes(words[short][:, _SHORT_SLIPS]), short.nonzero().flatten()
        shorter = _with_a_letter_less(words[slips])
        self._shorter, order = shorter.flatten().sort()
        self._word = slips.nonzero().flatten()[order // shorter.shape[1]]
        self._naming, self._whose = spelling.entry_to_word, spelling.entry_to_edit
        self._needed = torch.bincount(self._whose)

    def __call__(self, words: Tensor) -> bool:
        """Return whether the words (n, ``WORD_CHARS``) of a prompt may name any edit."""
        words = words[words[:, 0] > 0]
        hashes = word_hashes(words)
        near = torch.isin(self._exact, hashes)
        near[self._short_word[torch.isin(self._short, hashes).any(1)]] = True
        looked_for = _with_a_letter_less(words).flatten()
        steps = torch.zeros(len(self._shorter) + 1, dtype=torch.long, device=words.device)
        for right, step in ((False, 1), (True, -1)):
            place = torch.searchsorted(self._shorter, looked_for, right=right)
            steps.index_add_(0, place, torch.full_like(place, step))
        near[self._word[steps.cumsum(0)[:-1] > 0]] = True
        tally = torch.zeros(len(self._needed), dtype=torch.long, device=words.device)
        tally.index_add_(0, self._whose, near[self._naming].long())
        return bool(((self._needed > 0) & (tally == self._needed)).any())


def _with_a_letter_less(words: Tensor) -> Tensor:
    """Return the numbers of words (n, c) as they are, and without each of their letters: (n, c + 1)."""
    kept = torch.arange(WORD_CHARS, device=words.device)
    # Without letter i, those from i on are the ones behind them.
    place = kept + (kept >= kept[:, None]).long()
    padded = torch.nn.functional.pad(words, (0, 1))
    return torch.cat([word_hashes(words)[:, None], word_hashes(padded[:, place])], 1)
