"""By which tokens prompts name an edit's subject.

Keys at the end of a prompt tell relations apart far better than subjects: with another subject in its place an edit's
prompt ends in nearly the same key. Which subject is asked about is written in the prompt, so it is read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wisecli.routing.deciding.fuzzy_match import FUZZY_MATCH, split_words, token_characters
from wisecli.routing.deciding.subject_match import SUBJECT_MATCH


@dataclass(frozen=True)
class SubjectToken:
    """A token of a subject: all tokens that spell it (in capitals or not, with a space before it or not), and how much
    of the subject it makes up.
    """

    # For whoever reads it from a file: no further fields, no number that is not finite.
    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "allow_inf_nan": False}

    tokens: tuple[int, ...]
    share: float


# A subject's words, as the tokenizer splits it: as it is written, and in small and in capital letters.
Spellings = tuple[tuple[SubjectToken, ...], ...]


def subject_match_tensors(subjects: Sequence[Spellings]) -> dict[str, Tensor]:
    """The tensors of :class:`~wisecli.routing.deciding.subject_match.SubjectMatch`, from the words of every edit's
    subject.

    Edits without words have none; without any there are no tensors.
    """
    spellings = [(edit, words) for edit, own in enumerate(subjects) for words in own]
    word: dict[tuple[int, ...], int] = {}
    for _, words in spellings:
        for one in words:
            word.setdefault(one.tokens, len(word))
    if not word:
        return {}
    number = {token: place for tokens, place in word.items() for token in tokens}
    pairs = [(place, word[one.tokens], one.share) for place, (_, words) in enumerate(spellings) for one in words]
    tokens = torch.tensor(sorted(number))
    spelling = torch.tensor([number[token] for token in tokens.tolist()])
    whose = torch.tensor([edit for edit, _ in spellings])
    return dict(
        zip(SUBJECT_MATCH, (tokens, spelling, whose, *map(torch.tensor, zip(*pairs, strict=True))), strict=True)
    )


def fuzzy_match_tensors(table: Tensor, subjects: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The tensors of :class:`~wisecli.routing.deciding.fuzzy_match.FuzzyMatch`, from the tokens of every edit's
    subject.

    Without any word there are no tensors.

    Args:
        table: the letters of every token (v, ``TOKEN_CHARS``).
    """
    longest = max(map(len, subjects), default=0)
    ids = torch.tensor([[*own, *[-1] * (longest - len(own))] for own in subjects], dtype=torch.long)
    if not ids.numel():
        return {}
    words = split_words(token_characters(table, ids, ids >= 0))
    whose, place = words.any(-1).nonzero(as_tuple=True)
    if not len(whose):
        return {}
    spelt, naming = words[whose, place].unique(dim=0, return_inverse=True)
    once = torch.stack([whose, naming], 1).unique(dim=0)
    return dict(zip(FUZZY_MATCH, (table, spelt, once[:, 1].contiguous(), once[:, 0].contiguous()), strict=True))
