"""Which generated figures are taken of a model, whoever edited it: in forms with specificity, by WILD, both or none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from wisecli.edits.record import Edit
from wisecli.evaluation.answers import Answers
from wisecli.evaluation.forms import measure_forms, named_forms, writable_forms
from wisecli.evaluation.kinds import measure_kinds, named_kinds
from wisecli.evaluation.results import Results, evenly_spaced, merge_results
from wisecli.evaluation.specificity import measure_specificity
from wisecli.evaluation.wild import MAX_NEW_TOKENS, measure_wild, stop_tokens
from wisecli.models.prompts.prompt_forms import Form
from wisecli.models.text_input import context_window

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ProtocolName = Literal["forms", "wild", "teacher", "forms,wild"]


@dataclass(frozen=True)
class Generated:
    """The protocol, forms and kinds in which edits are asked, and how many edits.

    Args:
        before: whether WILD asks the unedited model.
    """

    protocol: ProtocolName
    forms: str
    ask: int
    before: bool = False
    kinds: str = "none"

    def __post_init__(self) -> None:
        named_forms(self.forms)
        named_kinds(self.kinds)

    @property
    def by_wild(self) -> bool:
        """Whether WILD's figures are taken: then all records are asked, and not bare once more."""
        return "wild" in self.protocol

    @property
    def in_forms(self) -> bool:
        """Whether some edits are asked in forms and kinds."""
        return "forms" in self.protocol


class Asker(Protocol):
    """A model before and after editing, from which answers of some length can be had."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""

    @property
    def config(self) -> PretrainedConfig:
        """The model's."""

    def answering(self, max_new_tokens: int, stops: frozenset[int] = frozenset()) -> Answers:
        """Return what answers in at most ``max_new_tokens``; ``stops`` end answers as well."""


def measure_generated(
    asker: Asker, what: Generated, edits: Sequence[Edit], records: Sequence[Edit], *, max_new_tokens: int
) -> tuple[Results, list[str]]:
    """Return figures of generated answers, and the names of the forms that were asked.

    Args:
        edits: the edits that are measured.
        records: all known edits, among which questions beside an edit are found, and other answers to its question.
        max_new_tokens: length of answers in forms.

    Raises:
        SettingsError: a form that is named needs a chat template, and there is none.
        ModelError: a text is longer than what the model takes.
    """
    found, labels = Results(), list[str]()
    if what.by_wild:
        answers = asker.answering(MAX_NEW_TOKENS, stop_tokens(asker.tokenizer))
        found = measure_wild(answers, edits, records, before=what.before)
    if what.in_forms:
        asked = [(place, edits[place]) for place in evenly_spaced(len(edits), what.ask)]
        in_forms, labels = _in_forms(asker, what, asked, records, max_new_tokens=max_new_tokens)
        in_kinds = _in_kinds(asker, what, asked, records, max_new_tokens=max_new_tokens)
        found = merge_results(found, in_forms, in_kinds)
    return found, labels


def _in_forms(
    asker: Asker, what: Generated, asked: Sequence[tuple[int, Edit]], records: Sequence[Edit], *, max_new_tokens: int
) -> tuple[Results, list[str]]:
    """Return figures of answers in forms and of specificity, and the forms' names."""
    answers = asker.answering(max_new_tokens)
    longest = max((edit.prompt for _, edit in asked), key=len)
    room = _room(asker) - max_new_tokens

    def fits(form: Form) -> bool:
        return len(asker.tokenizer(form.render(asker.tokenizer, longest))["input_ids"]) <= room

    chosen = writable_forms(what.forms, asker.tokenizer, fits)
    if not chosen:
        return Results(), []
    found = merge_results(measure_forms(answers, chosen, asked, records), measure_specificity(answers, asked, records))
    return found, [form.label for form in chosen]


def _in_kinds(
    asker: Asker, what: Generated, asked: Sequence[tuple[int, Edit]], records: Sequence[Edit], *, max_new_tokens: int
) -> Results:
    """Return figures of answers where edits are mentioned, and where they are asked in other ways."""
    chosen = named_kinds(what.kinds)
    if not chosen:
        return Results()
    # Two answers are twice as long.
    room = _room(asker) - 2 * max_new_tokens
    found = measure_kinds(asker.answering, chosen, asked, records, max_new_tokens=max_new_tokens, room=room)
    found.samples["asked"] = len(asked)
    return found


def _room(asker: Asker) -> int:
    return context_window(asker.config) or sys.maxsize
