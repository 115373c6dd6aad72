"""Figures with each edit's own values, and what counts as a right answer."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wisecli.edits.record import Edit
from wisecli.edits.text import unmarked
from wisecli.evaluation.answers import Answer

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Results:
    """Figures by name; for each the edits' values by their places, and the number of questions.

    ``before`` has what was also asked of the unedited model.
    """

    figures: dict[str, float] = field(default_factory=dict)
    each: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, values: Mapping[int, Sequence[float]]) -> None:
        """Add a figure, the mean over edits of the mean over an edit's values; nothing where there are none."""
        filled = {place: own for place, own in values.items() if own}
        if filled:
            self.each[name] = [(place, statistics.fmean(own)) for place, own in filled.items()]
            self.figures[name] = statistics.fmean(value for _, value in self.each[name])
            self.samples[name] = sum(map(len, filled.values()))


def merge_results(*parts: Results) -> Results:
    """Return all figures of several."""
    found = Results()
    for part in parts:
        found.figures.update(part.figures)
        found.each.update(part.each)
        found.samples.update(part.samples)
        found.before.update(part.before)
    return found


def is_exact_answer(answer: Answer, target: str) -> bool:
    """Return whether an answer is the target, and then ends."""
    return answer.ended and unmarked(answer.text) == unmarked(target)


def is_right(answer: Answer, edit: Edit) -> bool:
    """Return whether an answer is the one of an edit, or does not hold what the edit erases."""
    if edit.erased:
        return edit.answer.strip().casefold() not in answer.text.casefold()
    return is_exact_answer(answer, edit.answer)


def words_of(text: str) -> str:
    """Return the words of a question, without case and marks: what two records must share to ask the same."""
    return " ".join(_WORD.findall(text.casefold()))


def contradictory(records: Sequence[Edit]) -> frozenset[str]:
    """Return the questions, as words, that several records ask and want different answers to."""
    answers: dict[str, set[str]] = {}
    for record in records:
        for text in (record.prompt, *record.rephrases):
            answers.setdefault(words_of(text), set()).add(unmarked(record.answer))
    return frozenset(words for words, wanted in answers.items() if len(wanted) > 1)


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most ``most`` indices of ``count`` items, evenly spread over them."""
    few = min(count, most)
    return [place * count // few for place in range(few)]
