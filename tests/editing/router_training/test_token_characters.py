"""How the tokens of a vocabulary are spelt, whatever kind it is of."""

import re
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import tiny_qwen2_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from wisecli.editing.examples.subject_tokens import subject_tokens
from wisecli.editing.router_training.token_characters import vocabulary_characters
from wisecli.edits.record import Edit
from wisecli.routing.deciding.fuzzy_match import FuzzyMatch
from wisecli.routing.deciding.prompt_words import DIGIT, LETTER, SEPARATOR, TOKEN_CHARS, split_words, token_characters
from wisecli.routing.memories.subject_tensors import fuzzy_match_tensors

WRITTEN = {SEPARATOR: " ", **{DIGIT + digit: str(digit) for digit in range(10)}}
WRITTEN |= {LETTER + place: chr(ord("a") + place) for place in range(26)}


def spelt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The words of a text, as the table of its tokens has them; dots are letters beside the Latin ones."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    words = split_words(
        token_characters(vocabulary_characters(tokenizer), ids, torch.ones_like(ids, dtype=torch.bool))
    )[0]
    return ["".join(WRITTEN.get(letter, ".") for letter in word if letter) for word in words.tolist() if any(word)]


def byte_pairs() -> PreTrainedTokenizerBase:
    """One token a byte, spaces among them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate([*letters, "<s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def sentence_pieces() -> PreTrainedTokenizerBase:
    """A piece for every small letter and some words; whatever else is told in bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁nel", "son", "é", "N", "e", "l", "s"]
    vocabulary = [(piece, 0.0 if place < 258 else -float(place)) for place, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def word_pieces() -> PreTrainedTokenizerBase:
    pieces = ["[UNK]", "nel", "##son", "##elson", "n", "'", "o"]
    tokenizer = Tokenizer(models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("tokenizer", "text", "words"),
    [
        (byte_pairs(), "Nelson  Mandela's 27-year", ["nelson", "mandela", "s", "27", "year"]),
        (byte_pairs(), "Dvořák", ["dvo..k"]),  # two bytes each
        (byte_pairs(), "a\tb\nc<s>d", ["a", "b", "c", "d"]),
        (sentence_pieces(), "nelson Nelés", ["nelson", "neles"]),
        (sentence_pieces(), "leř sel", ["le.", "sel"]),
        (word_pieces(), "nelson n'o nelson", ["nelson", "n", "o", "nelson"]),
        (tiny_tokenizer(), "ba be, bin", ["ba", "be", "bin"]),
        (tiny_qwen2_tokenizer(), "ab ba", ["ab", "ba"]),
    ],
)
def test_words_are_put_together_from_tokens(tokenizer: PreTrainedTokenizerBase, text: str, words: list[str]) -> None:
    assert spelt(tokenizer, text) == words


@pytest.fixture(scope="module")
def table(real_tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return vocabulary_characters(real_tokenizer)


def test_a_real_vocabulary(real_tokenizer: PreTrainedTokenizerBase, table: torch.Tensor) -> None:
    assert table.shape == (len(real_tokenizer), TOKEN_CHARS)
    assert table.dtype == torch.uint8
    # Special tokens part words, and every other token is something.
    special = real_tokenizer.all_special_ids
    assert table[special].tolist() == [[SEPARATOR, *[0] * (TOKEN_CHARS - 1)]] * len(special)


@settings(deadline=None)
@given(text=st.text(alphabet=st.sampled_from("abcdeXYZ019 .,-'é\n"), max_size=30))
def test_words_are_those_of_the_text(real_tokenizer: PreTrainedTokenizerBase, table: torch.Tensor, text: str) -> None:
    plain = "".join(one for one in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(one))
    ids = torch.tensor([real_tokenizer(f" {text}", add_special_tokens=False)["input_ids"]])
    words = split_words(token_characters(table, ids, torch.ones_like(ids, dtype=torch.bool)))[0].tolist()
    found = ["".join(WRITTEN.get(letter, ".") for letter in word if letter) for word in words if any(word)]
    assert found == [word[:24] for word in re.findall(r"[a-z0-9]+", plain)]


@pytest.mark.parametrize(
    ("subject", "prompt", "expected"),
    [
        ("Nelson Mandela", "Where was Nelosn Mandela born?", True),
        ("Nelson Mandela", "Nelsn Mandela, born in", True),
        ("Nelson Mandela", "where was NELSON MANDELLA born", True),
        ("Nelson Mandela", "Where was Winnie Mandela born?", False),
        ("Pelé", "Where was Pele born?", True),
        ("Antonín Dvořák", "What did Antonin Dvořák write?", True),
        ("Antonín Dvořák", "What did Antonin Dvorak write?", True),
        ("Zdeněk Novák", "Where was Zdenek Novak born?", True),
        ("Antonín Dvořák", "What did Antnoin Dvořák write?", True),
        ("Montcoffer House", "Who built Montacute House?", False),
        ("Boeing 737", "Who flies the Boeing 747?", False),
        ("Boeing 737", "Who flies the Beoing 737?", True),
        ("Михаил Булгаков", "Где родился Михаил Булгаков?", True),
        ("O'Brien", "Who is O’Brein?", True),
    ],
)
def test_subjects_are_known_by_their_letters(
    real_tokenizer: PreTrainedTokenizerBase, table: torch.Tensor, subject: str, prompt: str, expected: bool
) -> None:
    edits = [Edit("no subject", "Who is it?", "me"), Edit("one", f"Who is {subject}?", "me", subject=subject)]
    tokens = subject_tokens(real_tokenizer, edits, {"one"})
    assert tokens.keys() == {"one"}
    own = FuzzyMatch(fuzzy_match_tensors(table, [(), tokens["one"]]))
    ids = torch.tensor([real_tokenizer(prompt)["input_ids"]])
    letters = own.characters(ids, torch.ones_like(ids, dtype=torch.bool))
    assert own(letters, torch.ones(1, 2, dtype=torch.bool)).tolist() == [[False, expected]]
