"""Which generated figures are taken of a model, whoever edited it: in forms with specificity, by WILD, both or none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from wisecli.edits.record import Edit
from wisecli.evaluation.answers import Answers
from wisecli.evaluation.forms import measure_forms, named_forms, writable_forms
from wisecli.evaluation.found import Found, spread, together
from wisecli.evaluation.specificity import measure_specificity
from wisecli.evaluation.wild import MAX_NEW_TOKENS, measure_wild, stop_tokens
from wisecli.models.forms import Form
from wisecli.models.loading import context_window

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ProtocolName = Literal["forms", "wild", "teacher", "forms,wild"]


@dataclass(frozen=True)
class Generated:
    """What is asked: by which protocol, in which ``forms`` how many edits, and whether WILD asks the unedited model."""

    protocol: ProtocolName
    forms: str
    ask: int
    before: bool = False

    def __post_init__(self) -> None:
        named_forms(self.forms)

    @property
    def by_wild(self) -> bool:
        """Whether WILD's figures are taken: then all records are asked, and not bare once more."""
        return "wild" in self.protocol

    @property
    def in_forms(self) -> bool:
        """Whether some edits are asked in forms."""
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
        """Answers of so many tokens at most; ``stops`` end them as well."""


def measure_generated(
    asker: Asker, what: Generated, edits: Sequence[Edit], records: Sequence[Edit], *, max_new_tokens: int
) -> tuple[Found, list[str]]:
    """Figures of generated answers, and the names of the forms that were asked.

    Args:
        edits: those that are measured.
        records: all that are known: what else may be asked about, and may want another answer to the same question.
        max_new_tokens: length of answers in forms.

    Raises:
        SettingsError: a form that is named needs a chat template, and there is none.
        ModelError: a text is longer than what the model takes.
    """
    found, labels = Found(), list[str]()
    if what.by_wild:
        answers = asker.answering(MAX_NEW_TOKENS, stop_tokens(asker.tokenizer))
        found = measure_wild(answers, edits, records, before=what.before)
    if what.in_forms:
        asked, labels = _in_forms(asker, what, edits, records, max_new_tokens=max_new_tokens)
        found = together(found, asked)
    return found, labels


def _in_forms(
    asker: Asker, what: Generated, edits: Sequence[Edit], records: Sequence[Edit], *, max_new_tokens: int
) -> tuple[Found, list[str]]:
    """Figures of answers in forms and of specificity, and the forms' names."""
    answers = asker.answering(max_new_tokens)
    asked = [(place, edits[place]) for place in spread(len(edits), what.ask)]
    longest = max((edit.prompt for _, edit in asked), key=len)
    room = (context_window(asker.config) or sys.maxsize) - max_new_tokens

    def fits(form: Form) -> bool:
        return len(asker.tokenizer(form.asked(asker.tokenizer, longest))["input_ids"]) <= room

    chosen = writable_forms(what.forms, asker.tokenizer, fits)
    if not chosen:
        return Found(), []
    found = together(measure_forms(answers, chosen, asked, records), measure_specificity(answers, asked, records))
    return found, [form.label for form in chosen]
