"""What a base model's request gate is learned from, and that it is learned."""

import random
import re
from pathlib import Path

import pytest
import torch
from support.helpers import save_tiny
from support.loading import CPU

from wisecli.artifacts.background_stats import Projections
from wisecli.artifacts.tensor_schema import REQUEST_GATE as ROWS
from wisecli.artifacts.tensor_schema import SENTENCE_TOKENS as SENTENCE_ROWS
from wisecli.artifacts.tensor_schema import WORD_STARTS as START_ROWS
from wisecli.artifacts.tensor_schema import require_layout
from wisecli.data.corpus import notes
from wisecli.data.request_wordings import requests
from wisecli.editing.router_training.request_gate_training import train_request_gate
from wisecli.editing.router_training.token_states import ReadSites
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.prompt_forms import forms
from wisecli.models.prompts.prompt_kinds import kinds, slots_in
from wisecli.models.prompts.question_rewriting import noun_phrase
from wisecli.models.synthetic.gate_examples import GateExamples
from wisecli.models.synthetic.synthetic_facts import synthetic_facts
from wisecli.progress import ignore_progress
from wisecli.routing.gating.request_gate import REQUEST_GATE, TOKEN_MARKS


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_model(save_tiny(tmp_path_factory.mktemp("base") / "base"), load=CPU)


def drawn_examples(loaded: Loaded, count: int) -> GateExamples:
    """Examples of so many facts, the same each time."""
    chance = random.Random(0)
    return GateExamples(loaded.tokenizer, list(synthetic_facts(count, chance)), chance)


def test_every_fact_is_asked_and_mentioned(loaded: Loaded) -> None:
    drawn = drawn_examples(loaded, 20)
    for number, fact in enumerate(drawn.facts):
        examples = list(drawn.of(number))
        asked = [one for one in examples if one.asks]
        assert 5 < len(asked) < len(examples) - 5
        assert {one.fact for one in examples} == {number}
        assert fact.subject in fact.questions[0]
        assert not any("{" in one.text for one in examples if one.sort in ("document", "hops", "checks", "time"))


def test_conversations_are_chats(loaded: Loaded) -> None:
    drawn = drawn_examples(loaded, 5)
    found = [one for number in range(5) for one in drawn.conversations(number)]
    assert bool(found) == bool(loaded.tokenizer.chat_template)
    if found:
        assert {one.asks for one in found} == {True, False}


def test_two_facts_are_asked_or_mentioned_together(loaded: Loaded) -> None:
    drawn = drawn_examples(loaded, 12)
    for number, fact in enumerate(drawn.facts):
        examples = list(drawn.of_two(number))
        assert [one.asks for one in examples] == [True, True, False]
        for one in examples:
            assert (one.fact, one.second) == (number, (number - 1) % len(drawn.facts))
            assert fact.subject in one.text
            assert drawn.facts[(number - 1) % len(drawn.facts)].subject in one.text


def test_names_are_written_in_other_ways_where_a_fact_is_asked_and_where_it_is_mentioned(loaded: Loaded) -> None:
    drawn, otherwise = drawn_examples(loaded, 12), []
    for number, fact in enumerate(drawn.facts):
        examples = list(drawn.dressed(number))
        assert [one.asks for one in examples] == [True, True, False]
        assert all(fact.subject in one.text for one in examples)
        otherwise += [not any(question in one.text for question in fact.questions) for one in examples]
    assert otherwise.count(True) > 24  # the rest begins with a name that has a word before it


def test_whole_prompts_are_learned_as_often_as_each_other(loaded: Loaded) -> None:
    drawn = drawn_examples(loaded, 24)
    found = [one for number in range(24) for one in drawn.of_whole_prompts(number)]
    asks = [one.asks for one in found]
    assert asks.count(True) > 24 * 6
    assert asks.count(False) > 24 * 8
    assert len({one.text for one in found}) == len(found)
    assert not any(re.search(r"\{(question|inner|subject|asking|noun|mark)\}", one.text) for one in found)


def test_what_is_around_questions_is_around_what_wants_no_answer_too(loaded: Loaded) -> None:
    drawn = drawn_examples(loaded, 40)
    found = [one for number in range(40) for one in drawn.with_words_around(number)]
    assert all(drawn.facts[one.fact].subject in one.text for one in found)
    asks = [one.asks for one in found]
    assert asks.count(True) == 120
    assert 100 < asks.count(False) <= 120
    closed = [one.asks for one in found if any(one.text.rstrip().endswith(word) for word in requests().closings)]
    assert {True, False} <= set(closed)


def test_what_is_asked_of_an_answer_stands_in_the_words_of_the_question_itself(loaded: Loaded) -> None:
    drawn, shapes, named = drawn_examples(loaded, 60), dict[bool, set[str]](), 0
    for number, fact in enumerate(drawn.facts):
        phrase, examples = noun_phrase(fact.questions[0], fact.subject), list(drawn.of_attributes(number))
        assert all(fact.subject in one.text for one in examples)
        if phrase is not None:
            named += 1
            assert any(phrase[0] in one.text for one in examples if not one.asks)
        for one in examples:
            shapes.setdefault(one.asks, set()).add(" ".join(one.text.split()[:3]))
    assert named > 15
    assert shapes[True] & shapes[False]  # as "What is the"


def test_near_names_have_words_of_many_names(loaded: Loaded) -> None:
    drawn = drawn_examples(loaded, 60)
    own = [set(fact.subject.split()) for fact in drawn.facts]
    near = [one for number in range(60) for one in drawn.of(number) if one.sort == "near name"]
    put_in = {word for one in near for word in one.text.split() if word in set().union(*own) - own[one.fact]}
    assert len(near) > 60
    assert len(put_in) > 50


def test_the_gate_is_learned_the_same_each_time(loaded: Loaded, tmp_path: Path) -> None:
    base = Path(loaded.model.config._name_or_path)
    site = find_site(base, Checkpoint(base), 2).below(0)
    chance = torch.Generator().manual_seed(1)
    heads = torch.zeros(2, site.d), torch.zeros(2), torch.ones(2), torch.zeros(2)
    projections = Projections(torch.randn(2, 8, site.d, generator=chance), torch.zeros(2, 8), *heads)
    learned = [
        train_request_gate(
            loaded, ReadSites(site, None), projections, share=0.02, batch_size=8, on_progress=ignore_progress
        )
        for _ in range(2)
    ]
    (gate, mentioned), (again, others) = learned
    assert tuple(gate) == (*REQUEST_GATE, *TOKEN_MARKS)
    require_layout(tmp_path, gate, {**ROWS, **SENTENCE_ROWS, **START_ROWS}, {})
    for name in gate:
        assert torch.equal(gate[name], again[name])
        assert gate[name].isfinite().all()
    assert torch.equal(mentioned, others)
    opened, count = mentioned.tolist()
    assert 0 <= opened <= count
    assert count > 8 * 15  # of eight facts and 22 kinds


def test_mentions_that_are_checked_are_none_that_are_learned_from(loaded: Loaded) -> None:
    drawn = drawn_examples(loaded, 6)
    checked = [one for number in range(6) for one in drawn.held_back(number)]
    assert not any(one.asks for one in checked)
    assert {one.sort for one in checked} > {"translate", "other time", "two hops", "document without a value"}
    assert not {one.text for one in checked} & {one.text for number in range(6) for one in drawn.of(number)}


def test_chats_begin_in_few_ways_so_that_these_are_read_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    drawn = drawn_examples(loaded, 80)
    question = drawn.facts[0].questions[0]
    asked = [one.text for _ in range(300) for one in drawn.of(0) if one.sort == "plain" and question in one.text]
    before = {text.partition(question)[0].rpartition("user: ")[0] for text in asked}
    assert len(asked) > 200
    assert 20 < len(before) <= 49  # and none before a chat of one turn


def test_nothing_that_is_held_back_is_learned_from() -> None:
    known = requests()
    learned = {*known.asked, *known.mentioned, *known.hops, *known.checks}
    held = {turn for kind in kinds().values() for pattern in kind.held for turn in pattern if len(slots_in(turn)) == 1}
    apart = {form.text.replace("{}", "{question}") for form in forms().values() if not form.trained}
    alone = {"{question}", "{capitals}", "{keywords:asked}", "{keywords:first}", "{pronoun}"}
    assert not {one.casefold() for one in learned} & {one.casefold() for one in (held | apart) - alone}


def test_documents_have_a_place_for_text_and_question() -> None:
    for layout in notes().layouts:
        assert "{text}" in layout
        assert "{ask}" in layout


def test_forms_and_texts_are_around_what_asks_and_what_mentions_alike(loaded: Loaded) -> None:
    drawn = drawn_examples(loaded, 80)
    found = [one for number in range(len(drawn.facts)) for one in (*drawn.of(number), *drawn.standing_in_forms(number))]
    for opening in ("### Instruction:\n", "I was wondering about this. ", "Question: "):
        asks = [one.asks for one in found if one.text.startswith(opening)]
        assert min(asks.count(True), asks.count(False)) > len(asks) / 6
    behind = [one.asks for one in found if one.sort == "around texts"]
    assert behind.count(False) > len(behind) / 5
