"""Questions beside the edits, which should not get an edit's answer: of its subject, and of its relation."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wisecli.data.corpus import made_up_subjects, relations
from wisecli.edits.record import Edit
from wisecli.evaluation.answers import Answers, targets_of
from wisecli.evaluation.results import Results, is_exact_answer, words_of
from wisecli.models.prompts.prompt_forms import forms

# Questions of each kind for an edit.
_EACH = 3
# Fewer subjects of other records than this, and made-up ones are taken, too.
_ENOUGH = 10
# Words shorter than this two questions may share.
_LONG = 4


@dataclass(frozen=True)
class SpecificityQuestion:
    """A question that should not get the answer of the edit at a place."""

    kind: str
    place: int
    edit: Edit
    prompt: str


def specificity_questions(asked: Sequence[tuple[int, Edit]], records: Sequence[Edit]) -> list[SpecificityQuestion]:
    """Return questions on another relation of the subject (``other_question``) or another subject (``other_subject``).

    Of edits whose prompt names their subject, and that give an answer. The draw is by the edit, whatever else is asked.

    Args:
        records: those whose subjects may take an edit's place; questions of theirs are left out.
    """
    known = {words_of(text) for record in records for text in (record.prompt, *record.rephrases)}
    names = list(dict.fromkeys(record.subject_name for record in records if record.subject_name))
    found = []
    for place, edit in asked:
        if not has_subject(edit):
            continue
        for kind, drawn in (("other_question", _questions(edit)), ("other_subject", _subjects(edit, names))):
            fresh = (prompt for prompt in drawn if words_of(prompt) not in known)
            found += [
                SpecificityQuestion(kind, place, edit, prompt) for prompt, _ in zip(fresh, range(_EACH), strict=False)
            ]
    return found


def has_subject(edit: Edit) -> bool:
    """Return whether an edit gives an answer about a subject that its prompt names."""
    return bool(edit.subject_name) and str(edit.subject_name) in edit.prompt and not edit.erased


def measure_specificity(answers: Answers, asked: Sequence[tuple[int, Edit]], records: Sequence[Edit]) -> Results:
    """Return shares of questions beside the edits that get an edit's answer, and did not before; less is better."""
    found = Results()
    beside = specificity_questions(asked, records)
    bare = forms()["bare"]
    given = _gets_edit(answers, [answers.edited_text(bare, question.prompt) for question in beside], beside)
    doubtful = [question.prompt for question, got in zip(beside, given, strict=True) if got]
    before = dict(zip(doubtful, answers.before(doubtful), strict=True))
    for kind in ("other_question", "other_subject"):
        values: dict[int, list[float]] = {}
        for question, got in zip(beside, given, strict=True):
            if question.kind == kind:
                taken = got and not is_exact_answer(before[question.prompt], question.edit.answer)
                values.setdefault(question.place, []).append(float(taken))
        found.add(kind, values)
    found.samples["without_subject"] = sum(not has_subject(edit) for _, edit in asked)
    return found


def _gets_edit(answers: Answers, texts: Sequence[str], beside: Sequence[SpecificityQuestion]) -> list[bool]:
    """Return which questions, as texts, get the edit's answer where an edit may have changed it."""
    changing = answers.may_change(texts)
    asked = [text for text, changes in zip(texts, changing, strict=True) if changes]
    targets = targets_of((text, question.edit.answer) for text, question in zip(texts, beside, strict=True))
    given = dict(zip(asked, answers.after(asked, stage="questions beside the edits", targets=targets), strict=True))
    return [
        text in given and is_exact_answer(given[text], question.edit.answer)
        for text, question in zip(texts, beside, strict=True)
    ]


def _questions(edit: Edit) -> Iterator[str]:
    """Yield questions about an edit's subject, of different relations, that share no long word with its prompt."""
    rng = random.Random(edit.prompt)
    taken = _long_words(edit.prompt)
    table = relations()
    for relation in rng.sample(table, len(table)):
        wording = rng.choice([text for text in relation.wordings if text.endswith("?")])
        if not taken & _long_words(wording):
            yield wording.replace("{}", str(edit.subject_name))


def _subjects(edit: Edit, names: Sequence[str]) -> Iterator[str]:
    """Yield an edit's prompt about other subjects, those of records before made-up ones."""
    rng = random.Random(edit.prompt)
    others = [name for name in names if not _overlap(name, str(edit.subject_name))]
    drawn = rng.sample(others, len(others))
    if len(drawn) < _ENOUGH:
        kinds = list(dict.fromkeys(relation.kind for relation in relations()))
        drawn += [made_up_subjects(rng.choice(kinds), 1, rng)[0] for _ in range(_ENOUGH)]
    for name in drawn:
        yield edit.prompt.replace(str(edit.subject_name), name)


def _overlap(name: str, other: str) -> bool:
    return name in other or other in name


def _long_words(text: str) -> set[str]:
    return {word for word in words_of(text).split() if len(word) >= _LONG}
