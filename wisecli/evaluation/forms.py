"""What a model answers in the forms that people ask in: as taught, rephrased, on consequences, on what is unrelated.

Everything is generated, greedily, and compared in full. One prompt of each kind is asked of each edit, in every form.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wisecli.edits.record import Edit
from wisecli.errors import SettingsError
from wisecli.evaluation.answers import Answers, targets_of
from wisecli.evaluation.results import Results, contradictory, is_exact_answer, is_right, words_of
from wisecli.models.prompts.prompt_forms import Form, forms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("as_taught", "rephrased", "rephrased_unique", "portability_answered", "unrelated_unchanged")
_ByPlace = dict[int, float]
_GROUPS: dict[str, bool | None] = {"all": None, "trained": True, "unseen": False}
# Every figure over forms: of all of them, of those that anything is learned in, and of those that nothing is.
GROUPED = tuple(kind + suffix for kind in KINDS for suffix in ("", "_trained", "_unseen"))


@dataclass(frozen=True)
class _FormPrompt:
    """One prompt of an edit; ``unique`` if no other record wants another answer to a rephrase."""

    kind: str
    place: int
    edit: Edit
    prompt: str
    answer: str | None = None
    unique: bool = False

    @property
    def target(self) -> str | None:
        """The one answer that is right, if there is one."""
        return (None if self.edit.erased else self.edit.answer) if self.answer is None else self.answer


def named_forms(names: str) -> list[Form]:
    """Return the forms of ``all``, ``trained``, ``unseen``, ``none`` or names with commas between.

    Raises:
        SettingsError: there is no form of a name.
    """
    if names == "none":
        return []
    if names in _GROUPS:
        return [form for form in forms().values() if _GROUPS[names] in (None, form.trained)]
    known = {form.label: form for form in forms().values()}
    chosen = [name.strip().replace(" ", "-") for name in names.split(",")]
    if unknown := [name for name in chosen if name not in known]:
        options = ", ".join(("all", "trained", "unseen", "none", *known))
        raise SettingsError(f"--forms: {unknown[0]!r} is unknown; known are {options}")
    return [known[name] for name in dict.fromkeys(chosen)]


def writable_forms(names: str, tokenizer: PreTrainedTokenizerBase, fits: Callable[[Form], bool]) -> list[Form]:
    """Return those of the named forms that a model can be asked in; of a group, the others are left out.

    Args:
        fits: whether the model takes texts of a form's length.

    Raises:
        SettingsError: one that is named by itself needs a chat template, and the tokenizer has none.
    """
    chosen = named_forms(names)
    unwritable = [form for form in chosen if form.chat and not tokenizer.chat_template]
    if unwritable and names not in _GROUPS:
        name = unwritable[0].label
        raise SettingsError(
            f"--forms: {name!r} needs a chat template, and the model's tokenizer has none; leave it out"
        )
    writable = [form for form in chosen if form not in unwritable]
    return [form for form in writable if names not in _GROUPS or fits(form)]


def measure_forms(
    answers: Answers, chosen: Sequence[Form], asked: Sequence[tuple[int, Edit]], records: Sequence[Edit]
) -> Results:
    """Return figures of every kind: over all forms, over those trained (``_trained``), over the others (``_unseen``),
    of each.

    Args:
        asked: the edits that are asked, with their places.
        records: all that may want another answer to the same question.
    """
    found = Results()
    prompts = list(_prompts(asked, contradictory(records)))
    values = _values(answers, chosen, prompts)
    for kind in KINDS:
        for group, trained in _GROUPS.items():
            names = [form.name for form in chosen if trained in (None, form.trained)]
            found.add(kind if group == "all" else f"{kind}_{group}", _by_edit(values, kind, names))
    for kind in KINDS:
        for form in chosen:
            own = list(values.get((kind, form.name), {}).values())
            if own:
                found.figures[f"{kind}/{form.label}"] = statistics.fmean(own)
    if chosen:
        found.samples["asked"] = len(asked)
        found.samples["forms"] = len(chosen)
        found.samples["contradictory"] = sum(prompt.kind == "rephrased" and not prompt.unique for prompt in prompts)
    return found


def _prompts(asked: Sequence[tuple[int, Edit]], contradicted: Collection[str]) -> Iterator[_FormPrompt]:
    """Yield the first prompt of each kind that an edit has."""
    for place, edit in asked:
        yield _FormPrompt("as_taught", place, edit, edit.prompt)
        for text in edit.rephrases[:1]:
            unique = not {words_of(edit.prompt), words_of(text)} & set(contradicted)
            yield _FormPrompt("rephrased", place, edit, text, unique=unique)
        for probe in edit.portability[:1]:
            yield _FormPrompt("portability_answered", place, edit, probe.prompt, answer=probe.answer)
        for probe in edit.locality[:1]:
            yield _FormPrompt("unrelated_unchanged", place, edit, probe.prompt)


def _values(
    answers: Answers, chosen: Sequence[Form], prompts: Sequence[_FormPrompt]
) -> dict[tuple[str, str], _ByPlace]:
    """Return whether each prompt is answered as it should be, by its kind and form, then by the edit's place."""
    cases = [(form, prompt) for form in chosen for prompt in prompts]
    asked = [(form, prompt) for form, prompt in cases if prompt.kind != "unrelated_unchanged"]
    kept = [(form, prompt) for form, prompt in cases if prompt.kind == "unrelated_unchanged"]
    values: dict[tuple[str, str], _ByPlace] = {}
    for (form, prompt), fine in zip([*asked, *kept], [*_right(answers, asked), *_same(answers, kept)], strict=True):
        for kind in (prompt.kind, "rephrased_unique") if prompt.unique else (prompt.kind,):
            values.setdefault((kind, form.name), {})[prompt.place] = float(fine)
    return values


def _right(answers: Answers, cases: Sequence[tuple[Form, _FormPrompt]]) -> list[bool]:
    """Return which prompts get the answer that they ask for."""
    texts = [answers.edited_text(form, prompt.prompt) for form, prompt in cases]
    targets = targets_of((text, prompt.target) for text, (_, prompt) in zip(texts, cases, strict=True))
    said = answers.after(texts, stage="answers in all forms", targets=targets)
    return [
        is_right(answer, prompt.edit) if prompt.answer is None else is_exact_answer(answer, prompt.answer)
        for answer, (_, prompt) in zip(said, cases, strict=True)
    ]


def _same(answers: Answers, cases: Sequence[tuple[Form, _FormPrompt]]) -> list[bool]:
    """Return which prompts get the unedited model's answer, word for word."""
    pairs = [
        (answers.edited_text(form, prompt.prompt), form.render(answers.tokenizer, prompt.prompt))
        for form, prompt in cases
    ]
    both = answers.both(pairs, stage="unrelated answers in all forms")
    return [said is None or said[0].text == said[1].text for said in both]


def _by_edit(values: dict[tuple[str, str], _ByPlace], kind: str, names: Sequence[str]) -> dict[int, list[float]]:
    """Return the values of each edit in some forms."""
    found: dict[int, list[float]] = {}
    for name in names:
        for place, value in values.get((kind, name), {}).items():
            found.setdefault(place, []).append(value)
    return found
