"""Generated answers in forms, and questions beside the edits, against what a fake and a tiny model say."""

import json
import statistics
from collections.abc import Callable, Sequence

import pytest
from support.evaluation import edited_model, text_of
from support.helpers import greedy_by_loop, random_rows, tiny_tokenizer
from support.loading import CPU

from wisecli.commands.measure.evaluate import EvalReport, evaluate
from wisecli.config import EvalSettings
from wisecli.edits.record import Edit, EvaluationPrompt
from wisecli.errors import GateFailedError, SettingsError
from wisecli.evaluation.answers import Answer, Answers, Targets
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.evaluation.forms import measure_forms, named_forms
from wisecli.evaluation.metrics import is_figure
from wisecli.evaluation.results import contradictory, evenly_spaced, is_exact_answer, is_right
from wisecli.evaluation.specificity import measure_specificity, specificity_questions
from wisecli.models.prompts.prompt_forms import forms

BARE, QUESTION, POLITE = (forms()[name] for name in ("bare", "question", "polite"))


class Told:
    """Answers by the text, of an edited and an unedited model, with all that each was asked."""

    def __init__(
        self,
        after: Callable[[str], str] = lambda _: "no idea",
        before: Callable[[str], str] = lambda _: "no idea",
        reworded: Callable[[str], str] = str,
    ) -> None:
        self.asked_after: list[str] = []
        self.asked_before: list[str] = []
        self.batches: list[int] = []

        def edited(texts: Sequence[str], _targets: Targets) -> list[Answer]:
            self.asked_after += texts
            self.batches.append(len(texts))
            return [Answer(after(text), ended=True) for text in texts]

        def unedited(texts: Sequence[str], _targets: Targets) -> list[Answer]:
            self.asked_before += texts
            return [Answer(before(text), ended=True) for text in texts]

        self.answers = Answers(tiny_tokenizer(), unedited, edited, batch_size=4, reworded=reworded)


def edit(name: str, *, rephrase: str | None = None, target: str | None = None) -> Edit:
    return Edit(
        name,
        f"where is {name}",
        target or f"at {name}",
        subject=name,
        rephrases=(rephrase or f"place of {name}",),
        locality=(EvaluationPrompt("who wrote it", "nobody"),),
        portability=(EvaluationPrompt(f"country of {name}", "Norway"),),
    )


def test_means_are_over_edits_and_forms_and_unique_rephrases_stand_apart() -> None:
    edits = [edit("Oslo"), edit("Bergen", rephrase="the town"), edit("Narvik", rephrase="The town?")]

    def after(text: str) -> str:
        if "wrote" in text:
            return "changed" if text.startswith("Question") else "no idea"
        if "country" in text:
            return "Norway"
        name = next((edit.id for edit in edits if edit.id in text), "Bergen")
        return f"At {name}." if text != "place of Oslo" else "elsewhere"

    told = Told(after)
    found = measure_forms(told.answers, [BARE, QUESTION, POLITE], list(enumerate(edits)), edits)
    # Of three forms two are trained; the rephrase of Oslo is wrong bare, and Narvik's is answered for Bergen.
    assert found.figures["as_taught"] == 1
    assert found.figures["rephrased"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found.figures["rephrased_trained"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found.figures["rephrased_unseen"] == pytest.approx(2 / 3)
    assert found.figures["rephrased_unique"] == pytest.approx(2 / 3)
    assert found.figures["rephrased_unique_unseen"] == 1
    assert found.figures["portability_answered"] == 1
    assert found.figures["unrelated_unchanged"] == pytest.approx(2 / 3)
    assert found.figures["unrelated_unchanged/question"] == 0
    assert found.figures["rephrased/bare"] == pytest.approx(1 / 3)
    assert found.figures["rephrased_unique/bare"] == 0
    assert found.each["rephrased"] == [(0, pytest.approx(2 / 3)), (1, 1.0), (2, 0.0)]
    assert {name: found.samples[name] for name in ("asked", "contradictory", "rephrased", "rephrased_unique")} == {
        "asked": 3,
        "contradictory": 2,
        "rephrased": 9,
        "rephrased_unique": 3,
    }
    assert all(map(is_figure, found.figures))


def test_no_text_is_answered_twice_and_the_unedited_model_is_asked_what_needs_it() -> None:
    edits = [edit("Oslo"), edit("Bergen")]
    told = Told(lambda text: "at Oslo" if "Oslo" in text else "no idea")
    chosen = [form for form in forms().values() if not form.chat]
    measure_forms(told.answers, chosen, list(enumerate(edits)), edits)
    measure_forms(told.answers, [BARE, POLITE], list(enumerate(edits)), edits)
    assert len(told.asked_after) == len(set(told.asked_after))
    assert len(told.asked_before) == len(set(told.asked_before))
    assert all("wrote" in text or "worte" in text or "rwote" in text for text in told.asked_before)
    assert max(told.batches) == 4
    lengths = [len(text.split()) for text in told.asked_after[: len(chosen)]]
    assert lengths == sorted(lengths, reverse=True)
    unrelated = len(told.asked_before)
    measure_specificity(told.answers, list(enumerate(edits)), edits)
    assert len(told.asked_after) == len(set(told.asked_after))
    # What does not get the edit's answer cannot be a leak, whatever was answered before.
    assert len(told.asked_before) > unrelated
    assert all("Oslo" in text for text in told.asked_before[unrelated:])


def test_a_method_that_rewords_is_given_what_the_user_writes() -> None:
    told = Told(reworded=lambda prompt: f"[{prompt}]")
    measure_forms(told.answers, [QUESTION], [(0, edit("Oslo"))], [])
    assert "[Question: where is Oslo\nAnswer:]" in told.asked_after
    assert told.asked_before == ["Question: who wrote it\nAnswer:"]


def test_specificity_counts_what_gets_the_answer_and_did_not_before() -> None:
    edits = [edit("Oslo"), edit("Bergen"), edit("Narvik")]
    asked = list(enumerate(edits))
    beside = specificity_questions(asked, edits)
    kinds = [one.kind for one in beside]
    assert kinds.count("other_question") == kinds.count("other_subject") == 9
    assert all(one.edit.id in one.prompt for one in beside if one.kind == "other_question")
    assert all(
        one.prompt.startswith("where is ") and one.edit.id not in one.prompt
        for one in beside
        if one.kind == "other_subject"
    )
    assert not {one.prompt for one in beside} & {one.prompt for one in edits}
    # Of a draw for some, the questions are those of a draw for all.
    assert [one.prompt for one in specificity_questions(asked[:1], edits)] == [one.prompt for one in beside[:6]]
    leaks = {one.prompt for one in beside if one.edit.id == "Oslo" and one.kind == "other_question"}
    known = sorted(leaks)[0]
    told = Told(
        lambda text: "at Oslo" if text in leaks else "no idea", lambda text: "at Oslo" if text == known else "no idea"
    )
    found = measure_specificity(told.answers, asked, edits)
    assert found.figures["other_question"] == pytest.approx(2 / 9)
    assert found.figures["other_subject"] == 0
    assert set(told.asked_before) == leaks
    assert found.samples == {"other_question": 9, "other_subject": 9, "without_subject": 0}


def test_records_without_a_subject_are_counted_and_left_out() -> None:
    edits = [edit("Oslo"), Edit("one", "where is it", "here"), Edit("two", "where", "there", subject="Bergen")]
    found = measure_specificity(Told().answers, list(enumerate(edits)), edits)
    assert found.samples == {"other_question": 3, "other_subject": 3, "without_subject": 2}


def test_an_answer_is_right_if_it_is_the_target_and_ends() -> None:
    assert is_exact_answer(Answer(" oslo.\n", ended=True), "Oslo")
    assert not is_exact_answer(Answer("Oslo", ended=False), "Oslo")
    assert not is_exact_answer(Answer("Oslo, Norway", ended=True), "Oslo")
    erased = Edit("gone", "where", "Oslo", op="erase")
    assert is_right(Answer("Bergen", ended=False), erased)
    assert not is_right(Answer("in oslo", ended=True), erased)
    assert is_right(Answer("Bergen", ended=True), Edit("new", "where", "Oslo", op="erase", replacement="Bergen"))


def test_questions_contradict_each_other_if_their_words_are_the_same_and_their_answers_are_not() -> None:
    records = [Edit("a", "Where is it?", "x"), Edit("b", "b", "X.", rephrases=("where IS it",)), Edit("c", "b", "y")]
    assert contradictory(records) == {"b"}


def test_edits_are_spread_evenly() -> None:
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 20) == [0, 1, 2]
    assert len(set(evenly_spaced(1999, 1000))) == 1000


def test_forms_are_named_by_groups_or_one_by_one() -> None:
    assert named_forms("none") == []
    assert named_forms("all") == list(forms().values())
    assert {form.trained for form in named_forms("unseen")} == {False}
    assert [form.name for form in named_forms("behind-a-paragraph, bare,behind a paragraph")] == [
        "behind a paragraph",
        "bare",
    ]
    with pytest.raises(SettingsError, match="--forms: 'loud' is unknown; known are all, trained, unseen, none, bare"):
        named_forms("bare,loud")


ENDS = list(range(1, 97, 4))
LENGTH = 6


def said(edited: EditedModel, prompt: str, *, memory: bool) -> Answer:
    """An answer worked out token by token."""
    held = edited.manifest.memory if memory else None
    ids = edited.tokenizer(prompt)["input_ids"]
    with edited.unedited():
        tokens = greedy_by_loop(edited.model, edited.manifest.site, held, ids, LENGTH, end=None)
    end = next((place for place, token in enumerate(tokens) if token in ENDS), len(tokens))
    return Answer(text_of(edited, tokens[:end]).strip(), ended=end < LENGTH)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[EditedModel, list[Edit], EvalReport]:
    """A tiny model whose answers end soon, with edits that hold in part, and the report on it."""
    root = tmp_path_factory.mktemp("forms")
    edited_model(root)
    place = root / "base" / "generation_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "eos_token_id": ENDS}))
    edited = attach(root / "memory", load=CPU)
    records = []
    for number in range(8):
        prompts = [text_of(edited, row.prompt) for row in random_rows(*[(3 + number, 1)] * 3, seed=70 + number)]
        target = said(edited, prompts[number % 2], memory=True).text or "da"
        probes = (EvaluationPrompt(prompts[2], "da de"),)
        records.append(Edit(str(number), prompts[0], target, rephrases=(prompts[1],), locality=probes))
    path = root / "records.jsonl"
    path.write_text("\n".join(json.dumps(record.as_dict()) for record in records))
    settings = EvalSettings(dataset=str(path), forms="bare,trailing-space,polite", ask=5, max_new_tokens=LENGTH)
    return edited, records, evaluate(root / "memory", settings, load=CPU)


def test_figures_are_those_of_a_loop_over_single_prompts(measured: tuple[EditedModel, list[Edit], EvalReport]) -> None:
    edited, records, report = measured
    asked = [records[place] for place in (0, 1, 3, 4, 6)]
    for name in ("bare", "trailing space", "polite"):
        form = forms()[name]

        def after(prompt: str, form: object = form) -> Answer:
            return said(edited, form.render(edited.tokenizer, prompt), memory=True)  # type: ignore[attr-defined]

        taught = [float(is_exact_answer(after(edit.prompt), edit.target)) for edit in asked]
        other = [float(is_exact_answer(after(edit.rephrases[0]), edit.target)) for edit in asked]
        assert report.asked[f"as_taught/{form.label}"] == pytest.approx(statistics.fmean(taught))
        assert report.asked[f"rephrased/{form.label}"] == pytest.approx(statistics.fmean(other))
        same = [
            after(probe.prompt).text == said(edited, form.render(edited.tokenizer, probe.prompt), memory=False).text
            for edit in asked
            for probe in edit.locality
        ]
        assert report.asked[f"unrelated_unchanged/{form.label}"] == pytest.approx(statistics.fmean(same))
    assert 0 < report.asked["as_taught"] < 1
    assert report.asked["as_taught_unseen"] == pytest.approx(
        (report.asked["as_taught/trailing-space"] + report.asked["as_taught/polite"]) / 2
    )
    assert "portability_answered" not in report.asked
    assert report.samples["asked"] == report.samples["without_subject"] == 5


def test_the_report_says_what_was_asked_and_checks_it(measured: tuple[EditedModel, list[Edit], EvalReport]) -> None:
    content = measured[2].as_json()
    assert content["config"]["asked_forms"] == ["bare", "trailing-space", "polite"]
    assert content["config"]["ask"] == 5
    report = measured[2]
    report.check({"as_taught/trailing-space": 0, "rephrased_unseen": 0})
    with pytest.raises(GateFailedError, match=r"as_taught/bare is 0\.\d+, not 1\.1"):
        report.check({"as_taught/bare": 1.1})
    lower = EvalReport("edits", {}, {}, {}, {}, 0.0, 0, asked={"other_question": 0.2})
    assert lower.as_json()["higher_is_better"] == {"edits": {"other_question": False}}
    lower.check({"other_question": 0.2})
    with pytest.raises(GateFailedError, match=r"other_question is 0\.200, not 0\.1"):
        lower.check({"other_question": 0.1})
    assert report.check({"as_taught": 0, "portability_answered": 1, "rephrased/chat": 1}, if_measured=True) == (
        "portability_answered",
        "rephrased/chat",
    )
