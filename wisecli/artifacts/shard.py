"""Masks, and the shard file: a delta in its mask's own coordinates, with evidence."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from wisecli.artifacts.tensor_schema import (
    EVIDENCE,
    MASKED,
    PROMPT_TOKENS,
    PROMPTS,
    SOME_EVIDENCE,
    TensorRows,
    require_layout,
)
from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import all_finite, load_tensors, save_tensors
from wisecli.models.layout.site import Site

MaskKind = Literal["columns", "elements"]
# Contexts from here on are translations of the prompt, each with a target of its own.
FIRST_LANGUAGE = 1 << 16
# Contexts of keys that are no prompt's own: of tokens that the model rests its attention on, of blanks that prompts end
# in, and of words that begin an answer before the target. Of the last only the residual counts, not the key: it puts a
# separator between two answers.
SINK_CONTEXT, SPACE_CONTEXT, BEGUN_CONTEXT = FIRST_LANGUAGE - 1, FIRST_LANGUAGE - 2, FIRST_LANGUAGE - 3
SEPARATOR_CONTEXT = FIRST_LANGUAGE - 4
# Columns that are kept in half precision.
_HALVED = ("evidence.keys", "evidence.residuals", "prompts.states")


@dataclass(frozen=True)
class Mask:
    """The random subspace of the matrix that one shard may change.

    ``columns``: whole input coordinates, ``indices`` (k,) of d_ff. ``elements``: single weights, as in the paper,
    ``indices`` (k,) of the flattened (d, d_ff).
    """

    kind: MaskKind
    indices: Tensor
    d: int
    d_ff: int

    def to(self, device: torch.device) -> Mask:
        """Return the same mask on another device."""
        return Mask(self.kind, self.indices.to(device), self.d, self.d_ff)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values that fill the mask."""
        return (self.d, len(self.indices)) if self.kind == "columns" else (len(self.indices),)

    def restrict(self, keys: Tensor) -> Tensor:
        """Return the part of keys (..., d_ff) that the mask reads."""
        return keys[..., self.indices] if self.kind == "columns" else keys

    def update(self, restricted: Tensor, values: Tensor) -> Tensor:
        """Return ``Δ a`` for restricted keys, in the type of ``values``: (..., k or d_ff) → (..., d)."""
        delta = values if self.kind == "columns" else self._scatter(values)
        return restricted.to(delta.dtype) @ delta.T

    def dense(self, values: Tensor) -> Tensor:
        """Return the whole ``Δ`` (d, d_ff)."""
        if self.kind == "elements":
            return self._scatter(values)
        return values.new_zeros(self.d, self.d_ff).index_copy(1, self.indices, values)

    def _scatter(self, values: Tensor) -> Tensor:
        flat = values.new_zeros(self.d * self.d_ff).index_put((self.indices,), values)
        return flat.view(self.d, self.d_ff)


@dataclass(frozen=True)
class Evidence:
    """What a shard was asked to store: its keys, what ``Δ`` should add there, and where each comes from.

    Shapes: ``keys`` (n, d_ff), ``residuals`` (n, d); ``edit`` (place in the manifest's list), ``position`` (0 = last
    prompt token) and ``context`` are (n,). ``held_out`` (n,) marks contexts that were never trained on.
    ``chat`` (n,) marks the chat template. ``token`` (n,) is the one at which a key of an own prompt was read; older
    shards do not say. ``call`` (n,) is there where the mean over a prompt decides: how strongly the prompts of a
    key's edit called the change once that edit had been trained.
    """

    keys: Tensor
    residuals: Tensor
    edit: Tensor
    position: Tensor
    context: Tensor
    held_out: Tensor
    chat: Tensor
    call: Tensor | None = None
    token: Tensor | None = None

    @classmethod
    def extra_keys(cls, keys: Tensor, residuals: Tensor, edit: int, *, position: int, context: int) -> Evidence:
        """Return evidence of one edit that none of its prompts gave: keys (n, d_ff), residuals (n, d)."""
        count, never = len(keys), torch.zeros(len(keys), dtype=torch.bool)
        number, place, origin = (torch.full((count,), value) for value in (edit, position, context))
        return cls(keys, residuals, number, place, origin, never, never, token=torch.zeros_like(number))

    @property
    def from_own_prompts(self) -> Tensor:
        """Return which keys came from edits' own prompts (n,). The others are alike for many edits, so no matrix can
        hold them.
        """
        return (self.context < SEPARATOR_CONTEXT) | (self.context >= FIRST_LANGUAGE)

    @property
    def answer(self) -> Tensor:
        """Which answer each key is of (n,): an edit's own, that in the chat template, and that in every language.

        They are numbered from 0, edit by edit: its own, that in the chat template, its translations.
        """
        which = torch.where(self.context < FIRST_LANGUAGE, self.chat.long(), self.context.long() - (FIRST_LANGUAGE - 2))
        number: Tensor = (self.edit.long() * (int(which.max()) + 1) + which).unique(return_inverse=True)[1]
        return number

    def rows(self, chosen: Tensor) -> Evidence:
        """Return some of the keys."""
        parts = {name: getattr(self, name) for name in Evidence.__dataclass_fields__}
        return Evidence(**{name: part[chosen] for name, part in parts.items() if part is not None})

    @staticmethod
    def joined(parts: Sequence[Evidence]) -> Evidence:
        """Concatenate evidence; columns that not all of it has are left out."""
        columns = {name: [getattr(part, name) for part in parts] for name in Evidence.__dataclass_fields__}
        whole = {name: own for name, own in columns.items() if all(tensor is not None for tensor in own)}
        return Evidence(**{name: torch.cat(own) for name, own in whole.items()})


FIRST_TOKEN_FORM = 1_000_000  # what is added to the form of a prompt's first token
GATE_FORM = 2_000_000  # what is added to the form of tokens with the states that a deep gate reads
JUDGED_FORM = 4_000_000  # what is added to the form of prompts that gates alone judge


@dataclass(frozen=True)
class PromptStates:
    """States of an early layer at the tokens of edits' prompts, by which a router knows prompts of the same meaning.

    Shapes: ``states`` (n, d); ``edit`` (place in the manifest's list) and ``form`` (each edit has several, from 0) are
    (n,); ``subject`` (n,) marks tokens of the edit's subject, and ``token`` (n,) is the number of each in the
    vocabulary, -1 where it is not known. The first token of a prompt, which is compared with nothing, has its form plus
    ``FIRST_TOKEN_FORM``. Tokens of prompts that gates judge come once more with the states of the layer that a deep
    gate reads; their form is higher by ``GATE_FORM``. All forms of prompts that are compared with none, but judged by
    gates, are higher by ``JUDGED_FORM``.
    """

    states: Tensor
    edit: Tensor
    form: Tensor
    subject: Tensor
    token: Tensor

    @property
    def compared(self) -> PromptStates:
        """Return the tokens without the first one of each prompt; a view where those come last."""
        compared = self.form < FIRST_TOKEN_FORM
        count = int(compared.sum())
        return self.rows(slice(count) if bool(compared[:count].all()) else compared)

    @property
    def gated(self) -> PromptStates:
        """Return the tokens with the states that the deep gate reads, if there are any."""
        own = self.rows((self.form >= GATE_FORM) & (self.form < JUDGED_FORM))
        return replace(own, form=own.form - GATE_FORM)

    @property
    def judged(self) -> PromptStates:
        """Return the tokens of prompts that gates alone judge, if there are any."""
        own = self.rows(self.form >= JUDGED_FORM)
        return replace(own, form=own.form - JUDGED_FORM)

    def openings(self, first_edit: int = 0) -> dict[tuple[int, int], Tensor]:
        """Return the states (d,) of prompts' first tokens, by edit and form, where those are words.

        Args:
            first_edit: the first edit of those whose prompts are wanted.
        """
        first = self.rows((self.form >= FIRST_TOKEN_FORM) & (self.form < GATE_FORM) & (self.edit >= first_edit))
        pairs = zip(first.edit.tolist(), (first.form - FIRST_TOKEN_FORM).tolist(), strict=True)
        return dict(zip(pairs, first.states, strict=True))

    @staticmethod
    def joined(parts: Sequence[PromptStates]) -> PromptStates:
        """Concatenate the tokens of several."""
        names = PromptStates.__dataclass_fields__
        return PromptStates(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def rows(self, chosen: Tensor | slice) -> PromptStates:
        """Return some of the tokens."""
        return PromptStates(*(getattr(self, name)[chosen] for name in PromptStates.__dataclass_fields__))


@dataclass(frozen=True)
class Shard:
    """One shard: its mask, its evidence, and the states of its prompts, if prompts are routed by meaning.

    ``values`` fill the mask; a shard that is meant for a lookup has none, as they can be solved for from its evidence.
    """

    mask: Mask
    values: Tensor | None
    evidence: Evidence
    prompts: PromptStates | None = None


def half(tensor: Tensor) -> Tensor:
    """Return a tensor in half precision where its values allow it, else in float32."""
    rounded = tensor.to(torch.float16)
    return rounded if all_finite(rounded) else tensor.float()


def save_shard(path: Path, shard: Shard, *, seed: int, edits: Sequence[str]) -> None:
    """Write ``shard-….safetensors``; the same shard makes the same bytes."""
    tensors = {"mask.indices": shard.mask.indices.to(torch.int32)}
    if shard.values is not None:
        tensors["delta.values"] = shard.values
    for kind, part in (("evidence", shard.evidence), ("prompts", shard.prompts)):
        columns = {} if part is None else {f"{kind}.{name}": column for name, column in vars(part).items()}
        tensors |= {name: _as_stored(name, column) for name, column in columns.items() if column is not None}
    about = {"mask_kind": shard.mask.kind, "seed": seed, "edits": list(edits)}
    save_tensors(path, tensors, {"wise.shard": json.dumps(about)})


def _as_stored(name: str, column: Tensor) -> Tensor:
    """Return a column of evidence or of prompts' states in the type that files have it in."""
    if name in _HALVED:
        return half(column)
    return column if column.is_floating_point() or column.dtype == torch.bool else column.to(torch.int32)


def shard_rows(kind: MaskKind, names: Container[str], *, solved: bool = True) -> TensorRows:
    """Return the tensors of a shard file, for a kind of mask, with those optional ones that are among ``names``.

    Args:
        solved: whether it has the values that fill its mask.
    """
    some = {name: row for name, row in SOME_EVIDENCE.items() if name in names}
    masked = {name: row for name, row in MASKED[kind].items() if solved or name == "mask.indices"}
    tokens = PROMPT_TOKENS if "prompts.token" in names else {}
    return {**masked, **EVIDENCE, **some, **({**PROMPTS, **tokens} if "prompts.states" in names else {})}


def shard_sizes(site: Site, edits: int) -> dict[str, int]:
    """Return the dimensions of a shard's tensors that site and manifest decide."""
    return {"d": site.d, "d_ff": site.width, "size": site.d * site.width, "edits": edits}


def load_shard(
    path: Path, site: Site, kind: MaskKind, digest: str, *, edits: int | None = None, solved: bool = True
) -> Shard:
    """Read a shard file.

    Args:
        edits: how many the manifest lists, if that is known.
        solved: whether it has the values that fill its mask.

    Raises:
        DamagedFileError: it is truncated, altered, or does not fit the site.
    """
    tensors = load_tensors(path, digest=digest)
    sizes = shard_sizes(site, 2**31 if edits is None else edits)
    require_layout(path, tensors, shard_rows(kind, tensors, solved=solved), sizes)
    mask = Mask(kind, tensors["mask.indices"].long(), site.d, site.width)
    evidence, prompts = evidence_in(path, tensors), prompts_in(tensors)
    whole = replace(evidence, keys=evidence.keys.float(), residuals=evidence.residuals.float())
    if prompts is not None:
        prompts = replace(prompts, states=prompts.states.float())
    return Shard(mask, tensors["delta.values"].float() if solved else None, whole, prompts)


def evidence_in(path: Path, tensors: Mapping[str, Tensor]) -> Evidence:
    """Return the evidence among a shard file's tensors, as it is stored.

    Raises:
        DamagedFileError: nothing of it was trained on.
    """
    stored = {name: tensors.get(f"evidence.{name}") for name in Evidence.__dataclass_fields__}
    evidence = Evidence(**{name: column for name, column in stored.items() if column is not None})
    if bool(evidence.held_out.all()):
        raise DamagedFileError(path, "every key is held out, none was trained on", "edit anew")
    return evidence


def prompts_in(tensors: Mapping[str, Tensor]) -> PromptStates | None:
    """Return the states of prompts among a shard file's tensors, as they are stored, if it has any."""
    if "prompts.states" not in tensors:
        return None
    unknown = {"prompts.token": torch.full_like(tensors["prompts.edit"], -1)}
    whole = {**unknown, **tensors}
    return PromptStates(*(whole[f"prompts.{name}"] for name in PromptStates.__dataclass_fields__))
