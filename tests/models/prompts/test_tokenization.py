import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import VOCABULARY, tiny_model
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from wisecli.models.prompts.tokenization import NO_LABEL, Row, collate, encode, in_batches

WORDS = ("[UNK]", "[BOS]", "the", "port", "of", "lark", "is", "bergen", "oslo", "new", "york", "newyork", ".")
ID = {word: number for number, word in enumerate(WORDS)}


def word_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Splits at spaces; writes `new york` as one word, so that a prompt's end may merge with what follows."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace("new york", "newyork")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[BOS] $A", special_tokens=[("[BOS]", ID["[BOS]"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, spaces too, so that every space shows."""
    alphabet = {chr(code): code - 32 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel({**alphabet, "[UNK]": 95}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def words(*names: str) -> tuple[int, ...]:
    return tuple(ID[name] for name in names)


def spelled(text: str) -> tuple[int, ...]:
    return tuple(ord(character) - 32 for character in text)


# --- one row ---


def test_the_target_is_what_follows_the_prompt() -> None:
    row = encode(word_tokenizer(), "the port of lark is", "bergen .")
    assert row == Row(words("the", "port", "of", "lark", "is"), words("bergen", "."))
    assert len(row) == 7


@pytest.mark.parametrize(
    ("prompt", "target", "tail"),
    [("is", "oslo", " oslo"), ("is", " oslo", " oslo"), ("is ", "oslo", "oslo"), ("is\t", "x", "x")],
)
def test_exactly_one_space_stands_between_prompt_and_target(prompt: str, target: str, tail: str) -> None:
    tokenizer = character_tokenizer()
    row = encode(tokenizer, prompt, target)
    assert row.prompt == tuple(tokenizer(prompt)["input_ids"])
    assert row.target == spelled(tail)


def test_special_tokens_stand_before_the_prompt_alone() -> None:
    row = encode(word_tokenizer(bos=True), "lark is", "bergen")
    assert row == Row(words("[BOS]", "lark", "is"), words("bergen"))


@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_whose_end_would_merge_with_the_target_is_kept_as_it_is_asked(*, bos: bool) -> None:
    tokenizer = word_tokenizer(bos=bos)
    assert ID["newyork"] in tokenizer("the port is new york")["input_ids"]
    row = encode(tokenizer, "the port is new", "york")
    assert row == Row((*words("[BOS]")[: int(bos)], *words("the", "port", "is", "new")), words("york"))


def test_an_end_token_closes_the_target() -> None:
    assert encode(word_tokenizer(), "lark is", "bergen", end=42).target == (*words("bergen"), 42)
    assert encode(word_tokenizer(), "lark is", "bergen", end=0).target == (*words("bergen"), 0)


@pytest.mark.parametrize(
    ("prompt", "target", "missing"), [("", "bergen", "prompt"), ("  ", "bergen", "prompt"), ("is", " ", "target")]
)
def test_a_text_without_tokens_is_refused(prompt: str, target: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"no token of the {missing}"):
        encode(word_tokenizer(), prompt, target)


def test_an_end_token_does_not_hide_an_empty_target() -> None:
    with pytest.raises(ValueError, match="no token of the target"):
        encode(word_tokenizer(), "is", "", end=42)


# --- rows lined up ---

ROWS = (Row((11, 12, 13), (21, 22)), Row((14,), (23,)), Row((15, 16), (24, 25, 26)))


def test_rows_are_lined_up_at_their_last_prompt_token() -> None:
    batch = collate(ROWS, pad=9)
    assert batch.start == 2
    assert batch.ids.tolist() == [[11, 12, 13, 21, 9], [9, 9, 14, 9, 9], [9, 15, 16, 24, 25]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[21, 22, NO_LABEL], [23, NO_LABEL, NO_LABEL], [24, 25, 26]]
    rows, columns = batch.labelled
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 2), (2, 2), (2, 3), (2, 4)]


def test_positions_count_the_tokens_of_a_row_from_nought() -> None:
    assert collate(ROWS).positions[collate(ROWS).mask.bool()].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3]
    assert int(collate(ROWS).positions.min()) == 0


TOKENS = st.integers(1, VOCABULARY - 1)
RANDOM_ROWS = st.lists(
    st.builds(
        Row, st.lists(TOKENS, min_size=1, max_size=6).map(tuple), st.lists(TOKENS, min_size=1, max_size=5).map(tuple)
    ),
    min_size=1,
    max_size=6,
)


@given(RANDOM_ROWS)
def test_a_batch_holds_every_row_and_nothing_else(rows: list[Row]) -> None:
    batch = collate(rows, pad=0)
    assert batch.ids.shape == batch.mask.shape == batch.positions.shape
    assert batch.labels.shape == (len(rows), batch.ids.shape[1] - batch.start)
    for index, row in enumerate(rows):
        real = batch.mask[index].bool()
        assert tuple(batch.ids[index][real].tolist()) == (row.prompt + row.target)[:-1]
        assert batch.positions[index][real].tolist() == list(range(int(real.sum())))
        assert batch.ids[index, batch.start] == row.prompt[-1]
        labels = batch.labels[index]
        assert tuple(labels[labels != NO_LABEL].tolist()) == row.target
        assert int(batch.ids[index][~real].sum()) == 0
    found_rows, columns = batch.labelled
    assert batch.labels[found_rows, columns - batch.start].tolist() == [token for row in rows for token in row.target]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_model_predicts_the_same_from_a_batch_as_from_each_row(architecture: str) -> None:
    model = tiny_model(architecture)
    batch = collate(ROWS, pad=9)
    with torch.no_grad():
        together = model(batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits[batch.labelled]
        alone = []
        for row in ROWS:
            logits = model(torch.tensor([row.prompt + row.target])).logits[0]
            alone.append(logits[len(row.prompt) - 1 : -1])
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_a_batch_moves_as_a_whole() -> None:
    moved = collate(ROWS).to(torch.device("meta"))
    assert {moved.ids.device.type, moved.mask.device.type, moved.labels.device.type} == {"meta"}
    assert moved.start == 2


# --- batches ---


@given(RANDOM_ROWS, st.integers(1, 8))
def test_every_row_is_in_one_batch_and_batches_keep_their_size(rows: list[Row], size: int) -> None:
    batches = list(in_batches(rows, size))
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    assert all(1 <= len(batch) <= size for batch in batches)
    assert len(batches) == -(-len(rows) // size)
    lengths = [len(rows[index]) for batch in batches for index in batch]
    assert lengths == sorted(lengths)


def test_no_rows_make_no_batches() -> None:
    assert list(in_batches([], 4)) == []
