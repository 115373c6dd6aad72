"""Edits → what a writer learns from: rows under several contexts, captured once; and keys of unrelated text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.capture import Activations, capture, suffix_logits
from wisecli.contexts import context_prefixes, continuations, unrelated_texts
from wisecli.edits import Edit
from wisecli.encode import NO_LABEL, Row, collate, encode, in_batches
from wisecli.errors import ModelError
from wisecli.events import Event, Watcher
from wisecli.generation import end_token
from wisecli.models import Loaded
from wisecli.shards import Evidence, Mask
from wisecli.site import Site

# How many tokens the model adds to each unrelated prompt that comes whole, and how many of those there are.
_CONTINUED, _CONTINUATION = 120, 12


@dataclass(frozen=True)
class Lesson:
    """Rows captured together, from the prompt's last token on; which edit and context each is (B,)."""

    activations: Activations
    edits: Tensor
    contexts: Tensor


def write_contexts(loaded: Loaded, count: int, *, tokens: int, seed: int) -> list[str]:
    """The bare prompt's empty prefix, ``count`` prefixes to train with, and one that is kept for calibration."""
    return ["", *context_prefixes(loaded.model, loaded.tokenizer, count + 1, tokens=tokens, seed=seed)]


def encode_edits(loaded: Loaded, edits: Sequence[Edit], prefix: str, *, train_end: bool) -> list[Row]:
    """The rows of edits under one context prefix.

    Raises:
        ModelError: the tokenizer leaves nothing of an edit.
    """
    end = end_token(loaded.model) if train_end else None
    rows = []
    for edit in edits:
        try:
            rows.append(encode(loaded.tokenizer, prefix + edit.prompt, edit.target, end=end))
        except ValueError as error:
            raise ModelError(f"edit {edit.id!r} cannot be used: {error}; reword it") from None
    return rows


def capture_lessons(
    loaded: Loaded,
    site: Site,
    edits: Sequence[tuple[int, Edit]],
    contexts: Sequence[tuple[int, str]],
    *,
    batch_size: int,
    train_end: bool,
) -> list[Lesson]:
    """Capture numbered edits under numbered contexts, rows whose targets are of like length together."""
    rows, origin = [], []
    for number, prefix in contexts:
        rows += encode_edits(loaded, [edit for _, edit in edits], prefix, train_end=train_end)
        origin += [(place, number) for place, _ in edits]
    lessons = []
    for indices in in_batches(rows, batch_size, by_target=True):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        place, context = torch.tensor([origin[index] for index in indices]).T
        lessons.append(Lesson(capture(loaded.model, site, batch).from_window(), place, context))
    return lessons


@torch.no_grad()
def learnt(loaded: Loaded, site: Site, mask: Mask, values: Tensor, lessons: Sequence[Lesson]) -> dict[int, float]:
    """Share of each edit's target tokens that are the arg-max after its bare prompt, by the edit's number."""
    shares: dict[int, float] = {}
    for lesson in lessons:
        bare = (lesson.contexts == 0).nonzero().flatten()
        if not len(bare):
            continue
        part = lesson.activations.rows(bare.to(lesson.activations.keys.device))
        hidden = part.hidden + mask.update(mask.restrict(part.keys), values).to(part.hidden.dtype)
        rows, columns = part.batch.labelled
        right = suffix_logits(loaded.model, site, part, hidden, (rows, columns)).argmax(-1)
        correct = (right == part.batch.labels[part.batch.labels != NO_LABEL]).float()
        for row, edit in enumerate(lesson.edits[bare].tolist()):
            shares[edit] = float(correct[rows == row].mean())
    return shares


def unrelated_keys(
    loaded: Loaded, site: Site, edits: Sequence[Edit], *, texts: int, batch_size: int, seed: int, watch: Watcher
) -> tuple[Tensor, Tensor]:
    """Keys (n, d_ff) of text that no edit may touch, and which of them training never sees (n,), every other text's.

    The texts come with the package, from the model itself, and from the edits' ``irrelevant``.
    """
    prompts = unrelated_texts(texts, seed=seed)
    watch(Event("unrelated text"))
    spoken = continuations(loaded.model, loaded.tokenizer, prompts[:_CONTINUED], tokens=_CONTINUATION, seed=seed)
    given = [text for edit in edits for text in edit.irrelevant]
    every = [*spoken, *prompts[_CONTINUED:], *given]
    rows = [row for row in (Row(tuple(loaded.tokenizer(text)["input_ids"]), ()) for text in every) if row.prompt]
    keys, unseen = [], []
    for indices in in_batches(rows, batch_size):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        real = batch.mask.bool()
        keys.append(capture(loaded.model, site, batch, above=False).keys[real])
        unseen.append((torch.tensor(indices, device=real.device) % 2 == 0)[:, None].expand_as(real)[real])
        watch(Event("unrelated text", sum(map(len, keys)), 0))
    return torch.cat(keys), torch.cat(unseen)


def gather_evidence(lessons: Sequence[Lesson], mask: Mask, values: Tensor, held_out: int) -> Evidence:
    """What a shard was asked to store, read off its lessons; ``held_out`` is the context kept for calibration."""
    fields: dict[str, list[Tensor]] = {name: [] for name in ("keys", "edit", "position", "context")}
    for lesson in lessons:
        rows, columns = (lesson.activations.batch.labels != NO_LABEL).nonzero(as_tuple=True)
        fields["keys"].append(lesson.activations.keys[rows, columns].float().cpu())
        rows, columns = rows.cpu(), columns.cpu()
        fields["edit"].append(lesson.edits[rows])
        fields["position"].append(columns)
        fields["context"].append(lesson.contexts[rows])
    joined = {name: torch.cat(parts) for name, parts in fields.items()}
    residuals = mask.update(mask.restrict(joined["keys"]), values.cpu())
    return Evidence(residuals=residuals, held_out=joined["context"] == held_out, **joined)
