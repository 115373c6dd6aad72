"""Training examples: the rows of edits under several contexts, captured once for all that is trained on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.config import EditSettings
from wisecli.editing.examples.context_prefixes import (
    AT_LINE_START,
    context_prefixes,
    greedy_prefixes,
    in_context,
    trained_forms,
)
from wisecli.editing.examples.erasure import ErasureRows
from wisecli.editing.examples.prompt_variants import AnswerKey, PromptVariant
from wisecli.edits.record import Edit
from wisecli.errors import ModelError
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row, collate, in_batches, row_of
from wisecli.models.running.activations import Activations, captured
from wisecli.models.running.generation import end_token
from wisecli.models.text_input import context_window, vocabulary_size

# Numbered edits, the numbered contexts that they are read in, and what else they are asked by.
Group = tuple[Sequence[tuple[int, Edit]], Sequence[tuple[int, str]], Sequence[PromptVariant]]


class Origin(NamedTuple):
    """Where a row comes from: the number of its edit, that of the context it is read in, and the answer it gives."""

    edit: int
    context: int
    answer: AnswerKey


@dataclass(frozen=True)
class TrainingExamples:
    """Rows captured together, B of them, from the prompt's last token on or whole.

    ``edits`` (B,) and ``contexts`` (B,) are numbers, ``answers`` the B answers. After a chat template an edit's target
    may be other tokens than after a bare prompt, and is then another answer, as it is in another language. Contexts
    that share an answer share its residuals.
    """

    activations: Activations
    edits: Tensor
    contexts: Tensor
    answers: tuple[AnswerKey, ...]

    def from_window(self) -> TrainingExamples:
        """Return the same from the prompts' last tokens on."""
        part = self.activations
        return self if part.first == part.batch.start else replace(self, activations=part.from_window())


def write_contexts(loaded: Loaded, settings: EditSettings) -> list[str]:
    """Return the bare prompt's empty prefix, contexts to train with, and one that is kept for calibration."""
    count = 1 if settings.in_forms else settings.contexts + 1
    if settings.prefixes == "greedy":
        prefixes = greedy_prefixes(loaded.model, loaded.tokenizer, count)
    else:
        prefixes = context_prefixes(
            loaded.model, loaded.tokenizer, count, tokens=settings.context_tokens, seed=settings.seed
        )
    forms = trained_forms(loaded.tokenizer, settings, context_window(loaded.model.config))
    return ["", *forms, *prefixes]


def encode_edits(
    loaded: Loaded,
    edits: Sequence[Edit],
    context: str,
    *,
    train_end: bool,
    erasures: ErasureRows = MappingProxyType({}),
) -> list[Row]:
    """Return the rows of edits under one context.

    Args:
        erasures: what is said in the place of erased answers; by default they are only unwanted at the prompt's end.

    Raises:
        ModelError: the tokenizer leaves nothing of an edit, or the model does not read all of it.
    """
    window = context_window(loaded.model.config)
    end = end_token(loaded.model) if train_end else None
    rows = []
    for edit in edits:
        try:
            prompt = in_context(loaded.tokenizer, context, edit.prompt)
            known = vocabulary_size(loaded.model.config)
            row = row_of(loaded.tokenizer, prompt, edit.answer, erased=edit.erased, end=end, vocabulary=known)
            erasure = erasures.get((edit.id, context in AT_LINE_START))
            rows.append(row if erasure is None else replace(erasure, prompt=row.prompt))
            if window is not None and len(rows[-1]) > window:
                raise ValueError(f"it is {len(rows[-1]):,} tokens long in its context, and the model takes {window:,}")
        except ValueError as error:
            raise ModelError(f"edit {edit.id!r} cannot be used: {error}; reword it") from None
    return rows


class NotFiniteError(Exception):
    """Edits, by their numbers, for which the model gives numbers that are not finite."""

    def __init__(self, edits: Iterable[int]) -> None:
        self.edits = frozenset(edits)
        super().__init__(f"not finite: {sorted(self.edits)}")


def require_finite(batches: Sequence[TrainingExamples]) -> None:
    """Check that captured states are finite.

    Raises:
        NotFiniteError: naming the edits of every row with a key or hidden state that is not finite.
    """
    found = set()
    for examples in batches:
        parts = examples.activations.keys, examples.activations.hidden
        sound = torch.stack([part.isfinite().flatten(1).all(-1) for part in parts]).all(0).cpu()
        found.update(examples.edits[~sound].tolist())
    if found:
        raise NotFiniteError(found)


def capture_groups(
    loaded: Loaded,
    site: Site,
    groups: Sequence[Group],
    *,
    batch_size: int,
    train_end: bool,
    erasures: ErasureRows = MappingProxyType({}),
    window: bool = True,
) -> list[list[TrainingExamples]]:
    """Return the batches of several groups; where layers are streamed, each is read once for all of them.

    Args:
        window: keep columns from the prompts' last tokens on only.
    """
    listed = [
        list(_in_rows(loaded, *group, batch_size=batch_size, train_end=train_end, erasures=erasures))
        for group in groups
    ]
    batches = (collate(rows).to(loaded.device) for parts in listed for rows, _ in parts)
    found = captured(loaded.model, site, batches, stream=loaded.stream, window=window, shared=True)
    if not window:  # no layer runs from the middle of a row
        found = (replace(whole, past=()) for whole in found)
    return [[_examples(next(found), origins) for _, origins in parts] for parts in listed]


def _examples(activations: Activations, origins: Sequence[Origin]) -> TrainingExamples:
    edits = torch.tensor([origin.edit for origin in origins])
    contexts = torch.tensor([origin.context for origin in origins])
    return TrainingExamples(activations, edits, contexts, tuple(origin.answer for origin in origins))


def _in_rows(
    loaded: Loaded,
    edits: Sequence[tuple[int, Edit]],
    contexts: Sequence[tuple[int, str]],
    further: Sequence[PromptVariant],
    *,
    batch_size: int,
    train_end: bool,
    erasures: ErasureRows,
) -> Iterator[tuple[list[Row], list[Origin]]]:
    """Yield the rows of one batch after the other, and where each row comes from."""
    rows, origins = [], []
    for number, context in contexts:
        # A form may leave a prompt as it is, as one without a question mark that has none.
        others = [
            (place, edit)
            for place, edit in edits
            if not context or in_context(loaded.tokenizer, context, edit.prompt) != edit.prompt
        ]
        rows += encode_edits(loaded, [edit for _, edit in others], context, train_end=train_end, erasures=erasures)
        origins += [Origin(place, number, AnswerKey(place, chat=context in AT_LINE_START)) for place, _ in others]
    rows += encode_edits(loaded, [prompt.edit for prompt in further], "", train_end=train_end)
    origins += [Origin(prompt.number, prompt.context, prompt.answer) for prompt in further]
    for indices in in_batches(rows, batch_size, by_target=True, by_beginning=True):
        yield [rows[index] for index in indices], [origins[index] for index in indices]
