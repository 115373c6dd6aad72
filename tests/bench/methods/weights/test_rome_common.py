from pathlib import Path

import pytest
from support.helpers import tiny_qwen2_tokenizer, tiny_tokenizer
from support.rewriting import bench_for

from wisecli.bench.methods.base import UnsuitableError
from wisecli.bench.methods.weights.rome_common import prefixes_for, read_fact, token_before
from wisecli.edits.record import Edit


@pytest.mark.parametrize(
    ("prompt", "subject", "word"),
    [
        ("ba de fi go lu", "de", 1),
        ("ba de fi go lu", "de fi", 2),
        ("ba de fi go lu", " De FI ", 2),
        ("ba de fi de lu", "de", 3),
        ("ba de fi go lu", "lu", 4),
        ("ba de fi go lu", "ma", 4),
        ("ba de fi go lu", None, 4),
        ("ba de fi go lu", "  ", 4),
        ("ba, de (fi) go?", "de (fi)", 2),
    ],
)
def test_the_subjects_last_token_is_found_under_every_prefix(
    tmp_path: Path, prompt: str, subject: str | None, word: int
) -> None:
    bench = bench_for(tmp_path, "llama")
    prefixes = ["", "ma. ", "de fi so pa. "]
    fact = read_fact(bench, Edit("one", prompt, "ta ta", subject=subject), prefixes)
    tokens = bench.loaded.tokenizer(prompt)["input_ids"]
    assert fact.prompts == len(prefixes)
    for row, column in enumerate(fact.columns[: fact.prompts].tolist()):
        own = fact.batch.ids[row, column - word : fact.batch.start + 1].tolist()
        assert own == tokens
        assert fact.batch.mask[row].sum() == len(tokens) + [0, 1, 4][row] + 1
    found = subject is not None and subject.strip() and subject.strip().lower() in prompt.lower()
    assert len(fact.batch.ids) == len(fact.columns) == len(prefixes) + bool(found)
    if found:
        essence = fact.batch.ids[-1][fact.batch.mask[-1].bool()].tolist()
        name = bench.loaded.tokenizer(prompt[prompt.lower().index(str(subject).strip().lower()) :])["input_ids"]
        length = len(bench.loaded.tokenizer(str(subject))["input_ids"])
        assert essence == [*name[:length], *bench.loaded.tokenizer("is a")["input_ids"]]
        assert fact.columns[-1] == fact.batch.start - 2


def test_a_token_that_goes_on_after_the_subject_is_the_one() -> None:
    words, letters = tiny_tokenizer(), tiny_qwen2_tokenizer()
    # As one word, "ban" is another token than "ba", and holds the subject's last letter.
    assert token_before(words, "de ban go", words("de ban go")["input_ids"], len("de ba")) == 1
    text = "de ban go"
    tokens = letters(text)["input_ids"]
    for end in range(1, len(text) + 1):
        assert token_before(letters, text, tokens, end) == end - 1


def test_prefixes_are_the_models_own_and_the_same_twice(tmp_path: Path) -> None:
    bench = bench_for(tmp_path, "gpt2")
    prefixes = prefixes_for(bench, 4, 6)
    assert prefixes[0] == ""
    assert len(prefixes) == 5
    assert all(prefix.endswith(". ") for prefix in prefixes[1:])
    assert prefixes == prefixes_for(bench, 4, 6)


def test_nothing_of_an_edit_left(tmp_path: Path) -> None:
    with pytest.raises(UnsuitableError, match="'odd'"):
        read_fact(bench_for(tmp_path, "llama"), Edit("odd", "ba", "?"), [""])
