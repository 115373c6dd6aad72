"""Edits → what a writer learns from: rows under several contexts, captured once, and what a shard keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from wisecli.artifacts.shard import Evidence, Mask
from wisecli.asking import Asked, answer_number
from wisecli.contexts import CHAT, context_prefixes, in_context
from wisecli.edits.record import Edit
from wisecli.elsewhere import Elsewhere
from wisecli.errors import ModelError
from wisecli.evading import Evasions
from wisecli.models.activations import Activations, captured, suffix_logits
from wisecli.models.generation import end_token
from wisecli.models.loading import Loaded
from wisecli.models.objectives import allowed, met, missed
from wisecli.models.site import Site
from wisecli.models.tokenization import Row, collate, in_batches, row_of

# Numbered edits, the numbered contexts that they are read in, and what else they are asked by.
Group = tuple[Sequence[tuple[int, Edit]], Sequence[tuple[int, str]], Sequence[Asked]]
Residual = Callable[[Tensor, Tensor, Tensor], Tensor]
# Keys of one position under two contexts count as the same above this cosine.
_SAME = 0.98


@dataclass(frozen=True)
class Lesson:
    """Rows captured together, from the prompt's last token on; which edit and context each is (B,).

    ``answers`` (B,): after a chat template an edit's target may be other tokens than after a bare prompt, and is then
    another answer, as it is in another language. Contexts that share an answer share its residuals.
    """

    activations: Activations
    edits: Tensor
    contexts: Tensor
    answers: Tensor


def write_contexts(loaded: Loaded, count: int, *, tokens: int, chat: bool, seed: int) -> list[str]:
    """The bare prompt's empty prefix, ``count`` prefixes to train with, and one that is kept for calibration.

    Args:
        chat: whether the model's chat template is one more context to train with.
    """
    prefixes = context_prefixes(loaded.model, loaded.tokenizer, count + 1, tokens=tokens, seed=seed)
    return ["", *([CHAT] if chat else []), *prefixes]


def encode_edits(
    loaded: Loaded, edits: Sequence[Edit], context: str, *, train_end: bool, evasions: Evasions = MappingProxyType({})
) -> list[Row]:
    """The rows of edits under one context.

    Args:
        evasions: what is said in the place of erased answers; by default they are only unwanted at the prompt's end.

    Raises:
        ModelError: the tokenizer leaves nothing of an edit.
    """
    end = end_token(loaded.model) if train_end else None
    rows = []
    for edit in edits:
        try:
            prompt = in_context(loaded.tokenizer, context, edit.prompt)
            row = row_of(loaded.tokenizer, prompt, edit.answer, erased=edit.erased, end=end)
            evasion = evasions.get((edit.id, context == CHAT))
            rows.append(row if evasion is None else replace(evasion, prompt=row.prompt))
        except ValueError as error:
            raise ModelError(f"edit {edit.id!r} cannot be used: {error}; reword it") from None
    return rows


class NotFiniteError(Exception):
    """Edits, by their numbers, for which the model gives numbers that are not finite."""

    def __init__(self, edits: Iterable[int]) -> None:
        self.edits = frozenset(edits)
        super().__init__(f"not finite: {sorted(self.edits)}")


def require_finite(lessons: Sequence[Lesson]) -> None:
    """Check what was captured.

    Raises:
        NotFiniteError: naming the edits of every row with a key or hidden state that is not finite.
    """
    found = set()
    for lesson in lessons:
        parts = lesson.activations.keys, lesson.activations.hidden
        sound = torch.stack([part.isfinite().flatten(1).all(-1) for part in parts]).all(0).cpu()
        found.update(lesson.edits[~sound].tolist())
    if found:
        raise NotFiniteError(found)


def capture_lessons(
    loaded: Loaded,
    site: Site,
    edits: Sequence[tuple[int, Edit]],
    contexts: Sequence[tuple[int, str]],
    *,
    batch_size: int,
    train_end: bool,
    evasions: Evasions = MappingProxyType({}),
) -> list[Lesson]:
    """Capture numbered edits under numbered contexts, rows whose targets are of like length together."""
    named: dict[str, Any] = {"batch_size": batch_size, "train_end": train_end, "evasions": evasions}
    return capture_groups(loaded, site, [(edits, contexts, ())], **named)[0]


def capture_groups(
    loaded: Loaded,
    site: Site,
    groups: Sequence[Group],
    *,
    batch_size: int,
    train_end: bool,
    evasions: Evasions = MappingProxyType({}),
) -> list[list[Lesson]]:
    """The lessons of several groups; where layers are streamed, each is read once for all of them."""
    named: dict[str, Any] = {"batch_size": batch_size, "train_end": train_end, "evasions": evasions}
    listed = [list(_in_rows(loaded, *group, **named)) for group in groups]
    batches = (collate(rows).to(loaded.device) for parts in listed for rows, _ in parts)
    found = captured(loaded.model, site, batches, stream=loaded.stream, window=True)
    return [[Lesson(next(found), *torch.tensor(origins).T) for _, origins in parts] for parts in listed]


def _in_rows(
    loaded: Loaded,
    edits: Sequence[tuple[int, Edit]],
    contexts: Sequence[tuple[int, str]],
    further: Sequence[Asked],
    *,
    batch_size: int,
    train_end: bool,
    evasions: Evasions,
) -> Iterator[tuple[list[Row], list[tuple[int, int, int]]]]:
    """Rows for one batch each, with the edit, context and answer that each row is of."""
    rows, origins = [], []
    for number, context in contexts:
        rows += encode_edits(loaded, [edit for _, edit in edits], context, train_end=train_end, evasions=evasions)
        origins += [(place, number, answer_number(place, chat=context == CHAT)) for place, _ in edits]
    rows += encode_edits(loaded, [one.edit for one in further], "", train_end=train_end)
    origins += [(one.number, one.context, one.answer) for one in further]
    for indices in in_batches(rows, batch_size, by_target=True):
        yield [rows[index] for index in indices], [origins[index] for index in indices]


@torch.no_grad()
def said(model: PreTrainedModel, site: Site, part: Activations, hidden: Tensor) -> list[Tensor]:
    """For each row, where the arg-max is as it should be (1 or 0) when ``hidden`` leaves the edited layer."""
    rows, columns = part.batch.labelled
    correct = met(suffix_logits(model, site, part, hidden, (rows, columns)), part.batch).float()
    return [correct[rows == row] for row in range(len(part.batch.ids))]


@torch.no_grad()
def unedited_losses(model: PreTrainedModel, site: Site, lessons: Sequence[Lesson]) -> dict[int, float]:
    """Summed loss of each edit's target in the unedited model, by the edit's number."""
    losses: dict[int, float] = {}
    for lesson in lessons:
        part = lesson.activations
        rows, columns = part.batch.labelled
        logits = suffix_logits(model, site, part, part.hidden, (rows, columns)).float()
        each = missed(logits, part.batch, allowed(model, site, part)).cpu()
        for edit, loss in zip(lesson.edits[rows.cpu()].tolist(), each.tolist(), strict=True):
            losses[edit] = losses.get(edit, 0.0) + loss
    return losses


@torch.no_grad()
def learnt(
    model: PreTrainedModel,
    site: Site,
    mask: Mask,
    values: Tensor,
    lessons: Sequence[Lesson],
    *,
    context: int | None = 0,
) -> dict[int, float]:
    """Share of each edit's target tokens that are the arg-max (of an erased one, where none is), by its number.

    Args:
        context: the one to look at, by default the bare prompt; ``None`` looks at all.
    """
    right: dict[int, list[Tensor]] = {}
    for lesson in lessons:
        chosen = torch.arange(len(lesson.contexts))
        if context is not None:
            chosen = (lesson.contexts == context).nonzero().flatten()
        if not len(chosen):
            continue
        part = lesson.activations.rows(chosen.to(lesson.activations.keys.device))
        hidden = part.with_update(mask.update(mask.restrict(part.keys), values))
        for edit, correct in zip(lesson.edits[chosen].tolist(), said(model, site, part, hidden), strict=True):
            right.setdefault(edit, []).append(correct)
    return {edit: float(torch.cat(parts).mean()) for edit, parts in right.items()}


def gather_evidence(lessons: Sequence[Lesson], held_out: int, residual: Residual, inside: Elsewhere) -> Evidence:
    """What a shard was asked to store, read off its lessons.

    Args:
        held_out: the context kept for calibration.
        residual: what should be added, from keys (n, d_ff), answers (n,) and positions (n,).
        inside: keys of each edit's answer after prompts that it does not answer.
    """
    fields: dict[str, list[Tensor]] = {name: [] for name in ("keys", "edit", "position", "context", "answer")}
    for lesson in lessons:
        batch = lesson.activations.batch
        rows, columns = batch.labelled[0], batch.labelled[1] - batch.start
        fields["keys"].append(lesson.activations.keys[rows, columns].float().cpu())
        rows, columns = rows.cpu(), columns.cpu()
        fields["edit"].append(lesson.edits[rows])
        fields["position"].append(columns)
        fields["context"].append(lesson.contexts[rows])
        fields["answer"].append(lesson.answers[rows])
    joined = {name: torch.cat(parts) for name, parts in fields.items()}
    answers = joined.pop("answer")
    residuals = residual(joined["keys"], answers, joined["position"])
    near = torch.zeros(len(joined["keys"]))
    for edit, keys in inside.keys.items():
        own = (joined["position"] > 0) & (joined["edit"] == edit)
        if len(keys) and bool(own.any()):
            near[own] = inside.white.cosines(joined["keys"][own], keys).amax(-1)
    unseen, chat = joined["context"] == held_out, answers < 0
    return thinned(Evidence(residuals=residuals, held_out=unseen, elsewhere=near, chat=chat, **joined))


def thinned(evidence: Evidence) -> Evidence:
    """Leave out keys that are as good as the bare prompt's at the same position.

    Deep in a long target the words before the prompt no longer matter.
    """
    place = evidence.answer * (int(evidence.position.max()) + 1) + evidence.position
    order = torch.full((int(place.max()) + 1,), -1)
    bare = (evidence.context == 0).nonzero().flatten()
    order[place[bare]] = bare
    twin = order[place]
    near = F.cosine_similarity(evidence.keys, evidence.keys[twin], dim=-1) > _SAME
    kept = (evidence.context == 0) | evidence.held_out | ~near | (twin < 0)
    return Evidence(**{name: getattr(evidence, name)[kept] for name in Evidence.__dataclass_fields__})
