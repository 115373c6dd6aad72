"""Figures of an edited model, under the same names before and after editing, whoever edited it and however."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from wisecli.edits.record import Edit
from wisecli.errors import ModelError, SettingsError
from wisecli.evaluation.forms import GROUPED, KINDS
from wisecli.evaluation.kinds import OVER_KINDS
from wisecli.evaluation.teacher_forcing import Measured, Reading
from wisecli.models.prompts.prompt_forms import forms
from wisecli.models.prompts.prompt_kinds import kinds
from wisecli.models.prompts.tokenization import Row

_ANSWER_MARGIN, _ANSWER_LIMIT = 8, 256
# Every figure there is, besides one of generalization for each language of the records.
_FIGURES = (
    *("reliability", "consequences", "generalization", "locality", "portability", "routing", "ood_generalization"),
    *("perplexity", "perplexity_median", "perplexity_clipped", "generated_exact", "generated_contains"),
    *("other_question", "other_subject"),
    *("wild_as_taught", "wild_rephrased", "wild_rephrased_unique", "wild_portability", "wild_locality"),
)
_LOWER_IS_BETTER = (
    *("perplexity", "perplexity_median", "perplexity_clipped", "other_question", "other_subject", "mentioned"),
)


def is_figure(name: str) -> bool:
    """Return whether this is the name of a figure that some records have."""
    figure, _, part = name.partition("/")
    if part and figure in OVER_KINDS:
        return any(kind.label == part and kind.asked == (figure == "asked") for kind in kinds().values())
    if part:
        return figure in KINDS and part in (form.label for form in forms().values())
    return name in (*_FIGURES, *GROUPED, *OVER_KINDS) or name.startswith("generalization_")


def require_figures(names: Iterable[str]) -> None:
    """Raise if a figure that an answer is to be held against is none.

    Raises:
        SettingsError: naming it.
    """
    for name in names:
        if not is_figure(name):
            known = ", ".join((*OVER_KINDS, *GROUPED, *_FIGURES))
            raise SettingsError(f"--fail-under {name}: there is no such figure; there are {known}")


def lower_is_better(name: str) -> bool:
    """Return whether a lower value of a figure is better."""
    return name.partition("/")[0] in _LOWER_IS_BETTER


class Question(NamedTuple):
    """A prompt with the answer that it should get, or that it should no longer get where that is ``erased``."""

    prompt: str
    answer: str
    erased: bool = False


class Subject(Protocol):
    """A model before and after editing."""

    def row(self, prompt: str, target: str, erased: bool = False) -> Row:
        """Return a prompt and its answer in tokens, as the unedited model is asked.

        Raises:
            ValueError: the tokenizer leaves nothing of either.
        """

    def teacher_forced(self, pairs: Sequence[Question], *, stage: str) -> list[Measured]:
        """Measure prompts and answers, the right tokens before each token of the answer."""

    def answers(self, prompts: Sequence[str], *, max_new_tokens: int) -> tuple[list[str], list[str]]:
        """Greedy answers, before and after."""


class Measuring:
    """Measures records one kind of question after the other.

    Args:
        consequences: edits that follow from the records; they are a figure of their own, over all of them.
        numbers: which memory holds an edit, by prompt and target, where that is to be compared with what opened.
        generate: whether answers are generated, too; of ``max_new_tokens`` at most, or a little more than any target.

    Attributes:
        before, after: means over edits.
        each: for each figure of the edited model the place of every edit that it was measured for, and its value there.
        samples: how many questions a figure is of.
    """

    def __init__(
        self,
        subject: Subject,
        records: Sequence[Edit],
        *,
        consequences: Sequence[Edit] = (),
        numbers: Mapping[tuple[str, str], int] | None = None,
        generate: bool = True,
        max_new_tokens: int | None = None,
    ) -> None:
        self.subject, self.records, self.numbers = subject, records, numbers
        self.consequences = consequences
        self.generate, self.max_new_tokens = generate, max_new_tokens
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.each: dict[str, list[tuple[int, float]]] = {}
        self.samples: dict[str, int] = {}

    def run(self) -> None:
        """Measure everything that the records allow."""
        reliability = self._run("reliability", [_asked(edit, [edit.prompt]) for edit in self.records])
        self._perplexity(reliability)
        self._run("consequences", [_asked(edit, [edit.prompt]) for edit in self.consequences])
        rephrased = self._run("generalization", [_asked(edit, edit.rephrases) for edit in self.records])
        self._routing(rephrased)
        self._translated()
        self._locality()
        self._run("portability", [[Question(p.prompt, p.answer) for p in edit.portability] for edit in self.records])
        self._ood()
        if self.generate:
            self._generated()

    def drop(self, prefix: str) -> None:
        """Leave out figures that mean nothing for this dataset."""
        for figures in (self.before, self.after, self.each):
            for name in [name for name in figures if name.startswith(prefix)]:
                del figures[name]

    def answer_length(self) -> int:
        """Return the most tokens an answer may have: the setting, or else a few more than the longest target."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        longest = max(len(self._row(Question(edit.prompt, edit.answer)).target) for edit in self.records)
        return min(longest + _ANSWER_MARGIN, _ANSWER_LIMIT)

    def _run(self, name: str, groups: Sequence[Sequence[Question]]) -> list[list[Measured]]:
        """Return the share of target tokens that are the arg-max: mean over an edit's prompts, then over edits."""
        measured = self._measure(name, groups)
        self._record(name, measured, lambda reading: reading.right)
        return measured

    def _measure(self, name: str, groups: Sequence[Sequence[Question]]) -> list[list[Measured]]:
        pairs = [pair for group in groups for pair in group]
        for pair in pairs:
            self._row(pair)
        flat = iter(self.subject.teacher_forced(pairs, stage=name))
        return [[next(flat) for _ in group] for group in groups]

    def _row(self, question: Question) -> Row:
        try:
            return self.subject.row(*question)
        except ValueError as error:
            raise ModelError(f"a record cannot be measured: {error}; reword {question.prompt!r}") from None

    def _record(self, name: str, groups: Sequence[Sequence[Measured]], value: Callable[[Reading], float]) -> None:
        self._keep(name, groups, lambda found: value(found.before), lambda found: value(found.after))

    def _keep(
        self,
        name: str,
        groups: Sequence[Sequence[Measured]],
        before: Callable[[Measured], float],
        after: Callable[[Measured], float],
    ) -> None:
        """Store a figure's mean over edits, before and after; each edit counts by the mean of its group."""
        filled = [(place, group) for place, group in enumerate(groups) if group]
        if filled:
            self.before[name] = statistics.fmean(statistics.fmean(map(before, group)) for _, group in filled)
            self.each[name] = [(place, statistics.fmean(map(after, group))) for place, group in filled]
            self.after[name] = statistics.fmean(found for _, found in self.each[name])
            self.samples[name] = sum(len(group) for _, group in filled)

    def _translated(self) -> None:
        """Measure the same fact asked in other languages, each as a figure of its own."""
        for language in sorted({translation.language for edit in self.records for translation in edit.translations}):
            translations = [
                [translation for translation in edit.translations if translation.language == language]
                for edit in self.records
            ]
            asked = [[Question(same.prompt, same.target) for same in of_edit] for of_edit in translations]
            self._run(f"generalization_{language}", asked)

    def _locality(self) -> None:
        groups = [[Question(probe.prompt, probe.answer) for probe in edit.locality] for edit in self.records]
        measured = self._measure("locality", groups)
        self._keep("locality", measured, lambda _: 1.0, lambda measurement: measurement.same)

    def _routing(self, rephrased: Sequence[Sequence[Measured]]) -> None:
        """Measure the share of rephrases that open the memory which holds their edit."""
        numbers = self.numbers or {}
        wanted = [numbers.get((edit.prompt, edit.target)) for edit in self.records]
        found = [
            (place, [measurement.opened == wanted[place] for measurement in group])
            for place, group in enumerate(rephrased)
            if group and wanted[place] is not None
        ]
        if found:
            self.before["routing"] = 0.0
            self.after["routing"] = statistics.fmean(right for _, group in found for right in group)
            self.each["routing"] = [(place, statistics.fmean(group)) for place, group in found]
            self.samples["routing"] = sum(len(group) for _, group in found)

    def _perplexity(self, reliability: Sequence[Sequence[Measured]]) -> None:
        """Measure perplexities of the targets; what is erased has none that is wanted."""
        measured = [
            (place, measurement)
            for place, (edit, group) in enumerate(zip(self.records, reliability, strict=True))
            for measurement in group
            if not edit.erased
        ]
        if not measured:
            return
        for figures, readings in (
            (self.before, [measurement.before for _, measurement in measured]),
            (self.after, [measurement.after for _, measurement in measured]),
        ):
            values = [reading.perplexity for reading in readings]
            figures["perplexity"] = statistics.fmean(values)
            figures["perplexity_median"] = statistics.median(values)
            figures["perplexity_clipped"] = statistics.fmean(min(value, 100.0) for value in values)
        self.each["perplexity_clipped"] = [(place, min(found.after.perplexity, 100.0)) for place, found in measured]

    def _ood(self) -> None:
        """Measure the share of a free text's tokens that the model is sure of, after the prompt it opens with."""
        groups = [[_split(text, edit) for text in edit.ood] for edit in self.records]
        measured = self._measure("ood", groups)
        self._record("ood_generalization", measured, lambda reading: reading.known)

    def _generated(self) -> None:
        """Store how often generated answers are the target, or contain it, before and after editing."""
        prompts = [edit.prompt for edit in self.records]
        answers = self.subject.answers(prompts, max_new_tokens=self.answer_length())
        for figures, texts in zip((self.before, self.after), answers, strict=True):
            pairs = list(zip(texts, self.records, strict=True))
            figures["generated_exact"] = statistics.fmean(_says(edit, text, whole=True) for text, edit in pairs)
            figures["generated_contains"] = statistics.fmean(_says(edit, text) for text, edit in pairs)
        pairs = list(zip(answers[1], self.records, strict=True))
        self.each["generated_exact"] = [
            (n, float(_says(edit, text, whole=True))) for n, (text, edit) in enumerate(pairs)
        ]
        self.samples["generated"] = len(prompts)


def _asked(edit: Edit, prompts: Sequence[str]) -> list[Question]:
    return [Question(prompt, edit.answer, edit.erased) for prompt in prompts]


def _says(edit: Edit, text: str, *, whole: bool = False) -> bool:
    """Return whether a text has an edit's answer in it, or as a ``whole`` is it; has it not, if it is erased."""
    answer = edit.answer.strip()
    if edit.erased:
        return answer.casefold() not in text.casefold()
    return text == answer if whole else answer in text


def _split(text: str, edit: Edit) -> Question:
    """Return a free text as the prompt it opens with and the rest; without one, its first word is the prompt."""
    prompt = edit.prompt if text.startswith(edit.prompt) else text.split(maxsplit=1)[0]
    return Question(prompt, text[len(prompt) :].lstrip() or text)
