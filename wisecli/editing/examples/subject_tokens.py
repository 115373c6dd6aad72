"""Edits → the tokens that their subjects are written with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from wisecli.data.corpus import unrelated_texts
from wisecli.edits.record import Edit
from wisecli.routing.deciding.subject_match import SubjectMatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from wisecli.routing.memories.subject_tensors import Spellings, SubjectToken, subject_match_tensors

# What tokenizers mark the beginning of a word with.
_MARKS = ("", "Ġ", "▁")


# Texts by which it is known how rare a token is.
_TEXTS = 600


def subject_spellings(tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit]) -> dict[str, Spellings]:
    """Return the tokens of each edit's subject by the edit's id, for those whose own prompt names it."""
    if not any(edit.subject_name for edit in edits):
        return {}
    spelt = {token: _plain(text) for text, token in tokenizer.get_vocab().items()}
    tokens: dict[str, list[int]] = {}
    for token in sorted(spelt):
        tokens.setdefault(spelt[token], []).append(token)
    texts = _ids(tokenizer, unrelated_texts(_TEXTS, seed=0))
    common = Counter(word for ids in texts for word in _words(spelt, ids))

    def weighed(words: set[str]) -> tuple[SubjectToken, ...]:
        rare = {word: math.log((_TEXTS + 1) / (common[word] + 1)) for word in sorted(words)}
        whole = sum(rare.values())
        return tuple(SubjectToken(tuple(tokens[word]), share / whole) for word, share in rare.items() if share > 0)

    subjects = [f" {edit.subject_name or ''}" for edit in edits]
    cases = (subjects, [subject.lower() for subject in subjects], [subject.upper() for subject in subjects])
    written = zip(*(_ids(tokenizer, forms) for forms in cases), strict=True)
    found = {}
    for edit, forms, prompt in zip(edits, written, _ids(tokenizer, [edit.prompt for edit in edits]), strict=True):
        split = (_words(spelt, ids) for ids in forms)
        spellings = tuple(words for words in dict.fromkeys(map(weighed, split)) if words)
        if spellings and _named(spellings, prompt):
            found[edit.id] = spellings
    return found


def subject_tokens(
    tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], named: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Return the tokens of each edit's subject, as written after a space, by the id of the edits that have one."""
    own = [edit for edit in edits if edit.id in named]
    written = _ids(tokenizer, [f" {edit.subject_name or ''}" for edit in own])
    return {edit.id: tuple(ids) for edit, ids in zip(own, written, strict=True)}


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def _plain(token: str) -> str:
    """Return a token's text without the mark of a word's beginning."""
    return token.lstrip("".join(_MARKS)).casefold()


def _words(spelt: Mapping[int, str], ids: Sequence[int]) -> set[str]:
    words = (spelt.get(token, "") for token in ids)
    return {word for word in words if any(letter.isalnum() for letter in word)}


def _named(spellings: Spellings, prompt: Sequence[int]) -> bool:
    ids = torch.tensor([prompt])
    return bool(SubjectMatch(subject_match_tensors([spellings]), 1)(ids, torch.ones_like(ids, dtype=torch.bool)))
