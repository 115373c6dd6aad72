"""A tokenizer's vocabulary → the letters that every token is spelt with."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wisecli.routing.deciding.prompt_words import DIGIT, LETTER, SEPARATOR, TOKEN_CHARS
from wisecli.routing.gating.name_features import CAPITAL, CAPITAL_WITHIN, NO_WORD, SMALL, SMALL_WITHIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ONE_APART = bytes([SEPARATOR])
_APARTS = re.compile(re.escape(_ONE_APART) + b"+")
# What ends a sentence or a line.
_ENDS = re.compile(r"[?!\n]|\.(\W|$)")
# What stands within words: a token that begins so goes on with one.
_WITHIN_WORDS = "'’-"
# What decoders give for a part of a character.
_PART = "\ufffd"
# A byte as vocabularies write it that fall back on such.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Vocabularies of bytes write those up to the space as this character and the next ones, and sentence pieces a space so.
_FIRST_BYTE, _SPACE_BYTE, _SPACE = 0x100, 0x120, "▁"
# Bytes that begin a character of several; vocabularies of bytes write these as they are.
_BEGINS = range(0xC2, 0xF5)


def sentence_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return the tokens that end a sentence or a line, and those that end a question: ascending, two (n,).

    Where there are none, it is a number that no token has.
    """
    texts = _token_texts(tokenizer)
    ends = [token for token, text in enumerate(texts) if _ENDS.search(text)]
    questions = [token for token, text in enumerate(texts) if "?" in text]
    return torch.tensor(ends or [len(texts)]), torch.tensor(questions or [len(texts)])


def word_starts(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return how every token begins (v,), by the numbers of :mod:`wisecli.routing.gating.name_features`.

    Special tokens are no words.
    """
    starts = [_start(text) for text in _token_texts(tokenizer)]
    for token in tokenizer.all_special_ids:
        starts[token] = NO_WORD
    return torch.tensor(starts, dtype=torch.uint8)


def _start(text: str) -> int:
    word = text.lstrip()
    if not word or not (word[0].isalnum() or word[0] in _WITHIN_WORDS):
        return NO_WORD
    capital = word[0].isupper() or word[0].isdigit()
    if word != text:
        return CAPITAL if capital else SMALL
    return CAPITAL_WITHIN if capital else SMALL_WITHIN


def _token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of every token within a text, by its number."""
    return _texts_of(tokenizer, max(tokenizer.get_vocab().values()) + 1)


@lru_cache(maxsize=1)  # several tables are made of one vocabulary
def _texts_of(tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Return the texts of so many tokens."""
    # Decoders drop the space that a text begins with, so another token goes before.
    lead = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before = len(tokenizer.decode(lead))
    return [text[before:] for text in _decoded(tokenizer, [[*lead, token] for token in range(count)])]


def vocabulary_characters(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the letters of every token as numbers (v, ``TOKEN_CHARS``), without case and marks; see the router's
    ``FuzzyMatch``.

    Special tokens part words.
    """
    texts = _token_texts(tokenizer)
    special = set(tokenizer.all_special_ids)
    table = bytearray(len(texts) * TOKEN_CHARS)
    for token, own in enumerate(texts):
        if token in special:
            letters = bytes([SEPARATOR])
        elif _PART in own:
            letters = bytes(_of_parts(str(tokenizer.convert_ids_to_tokens(token))))
        else:
            letters = _of_text(own)
        own_letters = letters[:TOKEN_CHARS]
        table[token * TOKEN_CHARS : token * TOKEN_CHARS + len(own_letters)] = own_letters
    return torch.frombuffer(table, dtype=torch.uint8).view(-1, TOKEN_CHARS)


def _decoded(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    """Return the text of each row of tokens; all at once where the tokenizer can."""
    if tokenizer.is_fast:
        texts: list[str] = tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=False)
        return texts
    return tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)


def _of_text(text: str) -> bytes:
    """Return the letters of a text; of most, which are ASCII, byte by byte."""
    if text.isascii():
        return _APARTS.sub(_ONE_APART, text.lower().encode().translate(_ascii()))
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return bytes(_joined(_number(char) for char in plain if not unicodedata.category(char).startswith("M")))


@cache
def _ascii() -> bytes:
    """Return the letter of every byte that ASCII has."""
    return bytes(_number(chr(code)) if code < 128 else 0 for code in range(256))


def _of_parts(token: str) -> list[int]:
    """Return the letters of a token with parts of characters in it: each byte is one that begins no character, so that
    a letter of two bytes is one letter ("Zdenek" for "Zdeněk" has one slip).
    """
    if found := _BYTE.fullmatch(token):
        code = int(found[1], 16)
        return [] if code in _BEGINS else [_other(code)]
    return _joined(_of_byte(char) for char in token if ord(char) not in _BEGINS)


def _of_byte(char: str) -> int:
    if char.isascii():
        return _number(char)
    return SEPARATOR if char == _SPACE or _FIRST_BYTE <= ord(char) <= _SPACE_BYTE else _other(ord(char))


def _number(char: str) -> int:
    if not char.isalnum():
        return SEPARATOR
    if char.isdecimal():
        return DIGIT + unicodedata.decimal(char)
    return LETTER + ord(char) - ord("a") if "a" <= char <= "z" else _other(ord(char))


def _other(code: int) -> int:
    """Return the number of a letter that is not Latin; letters far apart in an alphabet may share one."""
    first = LETTER + 26
    return first + code % (256 - first)


def _joined(letters: Iterable[int]) -> list[int]:
    """Return letters, with one mark wherever several part words."""
    return [one for kind, same in groupby(letters) for one in ([SEPARATOR] if kind == SEPARATOR else same)]
