"""Ways to ask and to mention: what is put together from them holds the question that it is made of."""

import json
import random
import re
from dataclasses import fields
from itertools import chain
from pathlib import Path

from wisecli.data.corpus import SLOT, small
from wisecli.data.request_wordings import requests, whole_prompts
from wisecli.models.prompts.pattern_slots import SLOTS, SLOTS_WITH_A_WAY, slots_in
from wisecli.models.prompts.prompt_kinds import kinds

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_tasks_and_times_hold_the_question() -> None:
    known, chance, question = requests(), random.Random(2), "Who runs the Tern database?"
    for _ in range(200):
        assert question in known.task(question, chance)
        timed = known.timed(question, chance)
        assert timed != question
        assert "runs the Tern database" in timed
        assert "{" not in timed
    drawn = "\n".join(known.task(question, chance) for _ in range(3000))
    assert "into Turkish" in drawn
    assert "questionurkish" not in drawn


def test_names_are_dressed_and_whole() -> None:
    known, chance = requests(), random.Random(2)
    assert all(one.count("T") == 1 for one in known.dresses)
    drawn = {kind: {known.dressed("Tern", kind, chance) for _ in range(400)} for kind in ("person", "ship")}
    assert all("Tern" in name and "{" not in name for names in drawn.values() for name in names)
    assert {"Dr Tern", '"Tern"', "the person Tern"} <= drawn["person"]
    assert "the ship Tern" in drawn["ship"]
    assert "Dr Tern" not in drawn["ship"]


def test_words_stand_around_a_question_that_stays_whole() -> None:
    known, chance, question = requests(), random.Random(2), "Who runs the Tern database?"
    texts = {known.with_words_around(question, chance) for _ in range(400)}
    assert all(question in text and text != question for text in texts)
    assert {text.startswith(question) for text in texts} == {text.endswith(question) for text in texts} == {True, False}
    begun = {known.with_words_around("The Tern database is run by", chance) for _ in range(50)}
    assert all(text.endswith("The Tern database is run by") for text in begun)


def test_phrases_stand_in_their_slots_and_leave_others_as_they_are() -> None:
    known, chance = requests(), random.Random(2)
    ways = (*known.asked, *known.mentioned, *known.openings, *known.closings, *known.about_questions)
    for pattern in ways:
        spelled = SLOT.findall(known.spelled_out(pattern, chance))
        assert not {small(name) for name in spelled} & set(known.phrases), pattern
        assert not pattern.startswith("{") or not known.spelled_out(pattern, chance).startswith(" ")
    assert known.spelled_out("{Voice} and {question}", chance)[0].isupper()
    assert known.spelled_out("{inner}{mark}", chance) == "{inner}{mark}"


def test_every_phrase_is_drawn_and_none_hides_a_slot_of_a_fact() -> None:
    known = requests()
    ways = [text for field in fields(known) if field.name != "phrases" for text in getattr(known, field.name)]
    slots = {small(name) for text in (*ways, *chain(*known.phrases.values())) for name in SLOT.findall(text)}
    assert set(known.phrases) <= slots
    assert not set(known.phrases) & (SLOTS | set(SLOTS_WITH_A_WAY))


def words_of(pattern: str) -> str:
    """A pattern's words in small letters, whatever the question's slot in it."""
    return " ".join(re.findall(r"[\w{}]+", re.sub(r"\{\w+(:\w+)?\}(\{mark\})?", " {} ", pattern).lower()))


def test_whole_prompts_have_slots_and_no_two_have_the_same_words() -> None:
    known = whole_prompts()
    for pattern in (*known.asked, *known.mentioned):
        slots = slots_in(pattern)
        assert slots, pattern
        assert all(name in (SLOTS_WITH_A_WAY if way else SLOTS) for name, way in slots), pattern
    written = [" ".join(re.findall(r"[\w{}:]+", one.lower())) for one in (*known.asked, *known.mentioned)]
    assert len(set(written)) == len(written) > 3000


def test_no_whole_prompt_is_one_that_is_measured() -> None:
    measured = {words_of(" ".join(pattern)) for kind in kinds().values() for pattern in kind.held}
    for path in BENCHMARKS.glob("unfamiliar*.json"):
        groups = json.loads(path.read_text(encoding="utf-8"))
        measured |= {words_of(pattern) for group in groups.values() for pattern in group.values()}
    known = whole_prompts()
    shared = {words_of(pattern) for pattern in (*known.asked, *known.mentioned)} & measured
    assert not {words for words in shared if words.strip("{} ")}
