"""Edits that are mentioned, and asked in other ways: figures against what a fake model says."""

from collections.abc import Callable, Sequence

import pytest
from support.helpers import tiny_tokenizer

from wisecli.commands.measure.evaluate import EvalReport
from wisecli.edits.record import Edit
from wisecli.errors import GateFailedError, SettingsError
from wisecli.evaluation.answers import Answer, Answers, Targets
from wisecli.evaluation.kinds import measure_kinds, named_kinds
from wisecli.evaluation.metrics import is_figure, lower_is_better
from wisecli.evaluation.results import Results
from wisecli.models.prompts.prompt_kinds import kinds

EDITS = [
    Edit("head", "Who is the head of Northwind Traders?", "Amara Lindqvist", subject="Northwind Traders"),
    Edit("chair", "Who is the chair of Blue Yonder?", "Tobias Wren", subject="Blue Yonder"),
    Edit("year", "In which year was Margie's Travel founded?", "1987", subject="Margie's Travel"),
]
LENGTH = 12
Says = Callable[[str], str]


class Asked:
    """Answers by the text, of an edited and an unedited model, with all that each was asked and how long it may be."""

    def __init__(self, after: Says, before: Says = lambda _: "no idea", reworded: Says = str) -> None:
        self.after, self.before, self.reworded = after, before, reworded
        self.asked_after: list[str] = []
        self.asked_before: list[str] = []
        self.lengths: list[int] = []

    def answering(self, max_new_tokens: int) -> Answers:
        def edited(texts: Sequence[str], _targets: Targets) -> list[Answer]:
            self.asked_after += texts
            self.lengths += [max_new_tokens] * len(texts)
            return [Answer(self.after(text), ended=True) for text in texts]

        def unedited(texts: Sequence[str], _targets: Targets) -> list[Answer]:
            self.asked_before += texts
            return [Answer(self.before(text), ended=True) for text in texts]

        return Answers(tiny_tokenizer(), unedited, edited, batch_size=4, reworded=self.reworded)

    def measured(self, names: str, edits: Sequence[Edit] = EDITS, room: int = 10**6) -> Results:
        asked = list(enumerate(edits))
        return measure_kinds(self.answering, named_kinds(names), asked, edits, max_new_tokens=LENGTH, room=room)


def recited(text: str) -> str:
    """What a model says that answers whatever mentions an edit."""
    return next((edit.target for edit in EDITS if str(edit.subject) in text), "no idea")


def test_what_recites_takes_over_all_that_is_mentioned() -> None:
    asked = Asked(recited)
    found = asked.measured("translate,quote,other-time,keywords")
    assert found.figures == {
        "asked": 1,
        "asked/keywords": 1,
        **{f"mentioned{part}": 1 for part in ("", "/translate", "/quote", "/other-time")},
        **{f"mentioned_unchanged{part}": 0 for part in ("", "/translate", "/quote", "/other-time")},
    }
    assert found.each["mentioned"] == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert found.samples == {"asked_prompts": 3, "mentioned_prompts": 9, "mentioned_unchanged_prompts": 9}
    assert all(map(is_figure, found.figures))
    assert len(asked.asked_before) == 9
    assert set(asked.asked_before) < set(asked.asked_after)


def test_what_the_unedited_model_says_too_is_not_taken_over() -> None:
    found = Asked(recited, recited).measured("mentioned")
    assert found.figures["mentioned"] == 0
    assert found.figures["mentioned_unchanged"] == 1


def test_an_answer_that_goes_on_is_taken_over_but_does_not_answer_what_is_asked() -> None:
    found = Asked(lambda text: f"{recited(text)}, as everyone knows").measured("translate,keywords")
    assert found.figures["mentioned"] == 1
    assert found.figures["asked"] == 0
    words_alike = Asked(lambda text: recited(text) + "s").measured("translate")
    assert words_alike.figures["mentioned"] == 0


def test_a_begun_answer_is_right_if_it_goes_on_with_the_rest() -> None:
    def rest(text: str) -> str:
        target = recited(text)
        first, _, last = target.partition(" ")
        return last if text.endswith(first) else target

    assert Asked(rest).measured("begun-target").figures["asked"] == 1
    assert Asked(recited).measured("begun-target").figures["asked"] == 0
    # A target of one word has no beginning.
    assert Asked(rest).measured("begun-target").samples["asked_prompts"] == 2
    assert Asked(rest).measured("begun-answer").figures["asked"] == 1


def test_of_two_facts_both_are_looked_for_in_an_answer_of_twice_the_length() -> None:
    def both(text: str) -> str:
        return " and ".join(edit.target for edit in EDITS if str(edit.subject) in text)

    asked = Asked(both)
    assert asked.measured("two-facts,keywords").figures["asked/two-facts"] == 1
    assert set(asked.lengths) == {LENGTH, 2 * LENGTH}
    assert Asked(recited).measured("two-facts").figures["asked"] < 1


def test_a_method_that_rewords_is_given_what_the_user_writes() -> None:
    asked = Asked(recited, reworded=lambda prompt: f"[{prompt}]")
    asked.measured("translate")
    assert all(text.startswith("[") and text.endswith("]") for text in asked.asked_after)
    assert not any("[" in text for text in asked.asked_before)


def test_erased_edits_and_prompts_without_room_are_left_out() -> None:
    erased = Edit("gone", "Who owns Contoso?", "Ann", op="erase", subject="Contoso")
    asked = Asked(recited)
    assert asked.measured("translate", [*EDITS, erased]).samples["mentioned_prompts"] == 3
    assert not any("Contoso" in text for text in asked.asked_after)
    assert asked.measured("translate", room=1).figures == {}


def test_prompts_are_of_the_half_that_nothing_is_learned_from_and_the_same_each_time() -> None:
    first, second = Asked(recited), Asked(recited)
    first.measured("translate")
    second.measured("translate,count", EDITS[:1])
    assert set(second.asked_after) & set(first.asked_after)
    beginnings = [pattern[0].split("{")[0] for pattern in kinds()["translate"].trained]
    assert not any(start and text.startswith(start) for text in first.asked_after for start in beginnings)


def test_kinds_are_named_by_groups_or_one_by_one() -> None:
    assert named_kinds("none") == []
    assert named_kinds("all") == list(kinds().values())
    assert {kind.asked for kind in named_kinds("asked")} == {True}
    assert {kind.asked for kind in named_kinds("mentioned")} == {False}
    assert [kind.name for kind in named_kinds("two-hops, code,two hops")] == ["two hops", "code"]
    with pytest.raises(SettingsError, match="--kinds: 'loud' is unknown; known are all, asked, mentioned, none, trans"):
        named_kinds("code,loud")


def test_gates_know_which_way_is_better() -> None:
    report = EvalReport("edits", {}, {}, {}, {}, 0.0, 0, asked={"asked": 0.5, "mentioned": 0.2, "mentioned/code": 0.3})
    assert report.as_json()["higher_is_better"]["edits"] == {"asked": True, "mentioned": False, "mentioned/code": False}
    report.check({"asked": 0.5, "mentioned": 0.2})
    with pytest.raises(GateFailedError, match=r"mentioned/code is 0\.300, not 0\.1"):
        report.check({"mentioned/code": 0.1})
    assert not lower_is_better("mentioned_unchanged")
    assert is_figure("asked/two-facts") and not is_figure("mentioned/two-facts") and not is_figure("asked/loud")
