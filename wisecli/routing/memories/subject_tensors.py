"""By which tokens prompts name an edit's subject.

Keys at the end of a prompt tell relations apart far better than subjects: with another subject in its place an edit's
prompt ends in nearly the same key. Which subject is asked about is written in the prompt, so it is read there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wisecli.routing.deciding.fuzzy_match import FUZZY_MATCH
from wisecli.routing.deciding.prompt_words import split_words, token_characters
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
    """Return the tensors ``SUBJECT_MATCH`` from the words of every edit's subject; none if there are no words."""
    names = [(edit, words) for edit, own in enumerate(subjects) for words in own]
    index: dict[tuple[int, ...], int] = {}
    for _, words in names:
        for word in words:
            index.setdefault(word.tokens, len(index))
    if not index:
        return {}
    word_of_token = {token: word for tokens, word in index.items() for token in tokens}
    token_ids = torch.tensor(sorted(word_of_token))
    token_to_word = torch.tensor([word_of_token[token] for token in token_ids.tolist()])
    name_to_edit = torch.tensor([edit for edit, _ in names])
    entries = [(name, index[word.tokens], word.share) for name, (_, words) in enumerate(names) for word in words]
    columns = map(torch.tensor, zip(*entries, strict=True))
    return dict(zip(SUBJECT_MATCH, (token_ids, token_to_word, name_to_edit, *columns), strict=True))


def fuzzy_match_tensors(table: Tensor, subjects: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return the tensors ``FUZZY_MATCH`` from the tokens of every edit's subject; none if there are no words.

    Args:
        table: the letters of every token (v, ``TOKEN_CHARS``).
    """
    longest = max(map(len, subjects), default=0)
    ids = torch.tensor([[*own, *[-1] * (longest - len(own))] for own in subjects], dtype=torch.long)
    if not ids.numel():
        return {}
    words = split_words(token_characters(table, ids, ids >= 0))
    edit, place = words.any(-1).nonzero(as_tuple=True)
    if not len(edit):
        return {}
    subject_words, index = words[edit, place].unique(dim=0, return_inverse=True)
    entry_to_edit, entry_to_word = torch.stack([edit, index], 1).unique(dim=0).unbind(1)
    entries = entry_to_word.contiguous(), entry_to_edit.contiguous()
    return dict(zip(FUZZY_MATCH, (table, subject_words, *entries), strict=True))
