import random
from pathlib import Path

import pytest
from support.byte_level import save_base
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from wisecli.data.corpus import further_relations, notes, relations, texts_to_measure_with
from wisecli.export.stock.router.reader_rows import ReaderRow, RowKind, RowSettings, reader_rows
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.synthetic.synthetic_facts import synthetic_facts

FACTS, SETTINGS = 6, RowSettings(facts=6, examples=3, longest=600, share=0.05)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Of bytes, so that every text can be read back."""
    base: Path = save_base(tmp_path_factory.mktemp("rows") / "base")
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    return found


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerBase) -> list[ReaderRow]:
    return reader_rows(tokenizer, SETTINGS, random.Random(3))


def test_every_fact_is_asked_and_mentioned(tokenizer: PreTrainedTokenizerBase, rows: list[ReaderRow]) -> None:
    assert {row.fact for row in rows if row.kind is not RowKind.RELATION} == set(range(FACTS))
    forms = len(list(usable_forms(tokenizer, trained=True)))
    for fact in range(FACTS):
        own = [row for row in rows if row.kind is RowKind.OWN and row.fact == fact]
        examples = [row for row in rows if row.kind is RowKind.EXAMPLE and row.fact == fact]
        assert len(own) == forms
        assert all(row.asks for row in own)
        assert {row.asks for row in examples} == {True, False}
        assert len({row.relation for row in (*own, *examples)}) == 1


def test_answers_stand_behind_some_examples_and_nothing_else(rows: list[ReaderRow]) -> None:
    assert all(0 < row.prompt <= len(row.tokens) for row in rows)
    assert {row.kind for row in rows if row.prompt < len(row.tokens)} == {RowKind.EXAMPLE}
    answered = [row.prompt < len(row.tokens) for row in rows if row.kind is RowKind.EXAMPLE]
    assert 0.2 < sum(answered) / len(answered) < 0.8


def test_behind_what_asks_a_fact_stands_its_answer_and_behind_other_prompts_at_times_another(
    tokenizer: PreTrainedTokenizerBase, rows: list[ReaderRow]
) -> None:
    facts = list(synthetic_facts(FACTS, random.Random(3), [*relations(), *further_relations()]))
    answered = [row for row in rows if row.kind is RowKind.EXAMPLE and row.prompt < len(row.tokens)]
    said = [str(tokenizer.decode(list(row.tokens[row.prompt :]))).strip() for row in answered]
    own = [text == facts[row.fact].answer for row, text in zip(answered, said, strict=True)]
    assert all(right for row, right in zip(answered, own, strict=True) if row.asks)
    others = [right for row, right in zip(answered, own, strict=True) if not row.asks]
    assert 0.2 < sum(others) / len(others) < 0.8


def test_nothing_is_learned_from_what_asks_nothing_because_of_a_name_alone(
    tokenizer: PreTrainedTokenizerBase, rows: list[ReaderRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wisecli.export.stock.router.reader_rows._OF_NAMES", ())
    every = reader_rows(tokenizer, SETTINGS, random.Random(3))
    left_out = [row for row in every if row not in set(rows)]
    assert left_out
    assert not any(row.asks for row in left_out)
    assert [row for row in every if row not in set(left_out)] == rows


def test_where_a_chat_moves_on_nothing_is_asked_from_the_end_of_the_last_answer_on(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_base(tmp_path / "base"))
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</>\n{% endfor %}<assistant>"
    )
    facts = list(synthetic_facts(FACTS, random.Random(3), [*relations(), *further_relations()]))
    closed = [row for row in reader_rows(tokenizer, SETTINGS, random.Random(3)) if row.closed]
    assert len(closed) == 3 * FACTS
    for row in closed:
        assert not row.asks
        before, behind = (
            str(tokenizer.decode(list(part)))
            for part in (row.tokens[: row.closed], row.tokens[row.closed : row.prompt])
        )
        assert before.endswith(f"<assistant>{facts[row.fact].answer}")
        assert behind.startswith("</>\n<user>")
        assert behind.endswith("</>\n<assistant>")


def test_some_that_ask_and_some_that_mention_have_other_texts_around_them(tokenizer: PreTrainedTokenizerBase) -> None:
    without, with_some = (
        reader_rows(tokenizer, RowSettings(FACTS, 3, 5000, 0.05, around), random.Random(3)) for around in (0, 4)
    )
    pages = [text for text, _ in notes().notes]
    for asks in (True, False):
        read = [str(tokenizer.decode(list(row.tokens))) for row in with_some if row.asks == asks]
        before = [str(tokenizer.decode(list(row.tokens))) for row in without if row.asks == asks]
        many, few = ([sum(page in text for page in pages) >= 6 for text in some] for some in (read, before))
        assert sum(many) > sum(few)


def test_relations_are_asked_in_all_their_wordings(rows: list[ReaderRow]) -> None:
    known = [*relations(), *further_relations()]
    numbers = {row.relation for row in rows if row.kind is RowKind.RELATION}
    assert numbers == set(range(max(8, round(0.05 * len(known)))))
    for number in numbers:
        read = [row for row in rows if row.kind is RowKind.RELATION and row.relation == number]
        assert len(read) == len(known[number].wordings)
        assert all(row.fact == -1 and row.asks for row in read)


def test_long_prompts_are_left_out(tokenizer: PreTrainedTokenizerBase, rows: list[ReaderRow]) -> None:
    longest = sorted(row.prompt for row in rows)[len(rows) // 2]
    short = RowSettings(SETTINGS.facts, SETTINGS.examples, longest, SETTINGS.share)
    found = reader_rows(tokenizer, short, random.Random(3))
    assert found == [row for row in rows if row.prompt <= longest]


def test_no_text_is_both_fitted_and_measured(tokenizer: PreTrainedTokenizerBase, rows: list[ReaderRow]) -> None:
    read = "\n".join(tokenizer.batch_decode([list(row.tokens) for row in rows]))
    assert not [text for text in texts_to_measure_with() if text in read]
