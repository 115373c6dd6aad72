"""What is decided once a prompt: where it ends, whether it names what an edit is about, and what answers it.

Needs torch only; exports carry this very file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

UNROUTED = -1
# How much of a subject a prompt must hold: three fifths of its tokens, each by how rare it is in unrelated text.
NAMED = 0.6
# Tensors that say which tokens name the subject of which edit.
NAMES = tuple(f"names.{part}" for part in ("tokens", "words", "whose", "named", "naming", "shares"))


class Names(nn.Module):
    """The tokens that edits' subjects are written with.

    ``tokens`` (v,) ascending, and the word that each spells, ``words`` (v,) below v; several tokens may spell one,
    with a capital or a space before it. Names (g,) are of the edits ``whose`` (g,); several may be of one, as a
    tokenizer splits capitals otherwise. Name ``named`` (q,) has the word ``naming`` (q,), as ``shares`` (q,) of the
    whole, which add up to 1 a name.

    Args:
        tensors: all of ``NAMES``; they become buffers.
        edits: how many edits there are, M.
    """

    tokens: Tensor
    words: Tensor
    whose: Tensor
    named: Tensor
    naming: Tensor
    shares: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], edits: int) -> None:
        super().__init__()
        self.edits = edits
        for name in NAMES:
            self.register_buffer(name.removeprefix("names."), tensors[name])

    def forward(self, ids: Tensor, prompt: Tensor) -> Tensor:
        """Which edits' subjects are named in rows: token ids (B, T), and which belong to prompts (B, T) → (B, M)."""
        place = torch.searchsorted(self.tokens, ids.contiguous()).clamp(max=len(self.tokens) - 1)
        known = (self.tokens[place] == ids) & prompt
        shares = self.shares.float()
        held = shares.new_zeros(len(ids), len(self.tokens) + 1)
        held = held.scatter(1, self.words[place].where(known, len(self.tokens)), 1.0)
        share = held.new_zeros(len(ids), len(self.whose))
        share = share.index_add(1, self.named, held[:, self.naming] * shares)
        named = held.new_zeros(len(ids), self.edits).index_add(1, self.whose, (share > NAMED - 1e-4).to(held.dtype))
        return named > 0


class PromptGate:
    """For sequence routing: the choice made at a row's last prompt token, kept on its attention cache."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._last: Tensor | None = None
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._earlier = 0

    def before_forward(self, _model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Forward pre-hook of the model: notes the cache, the tokens, and where each row's prompt ends."""
        mask, self._cache = named.get("attention_mask"), named.get("past_key_values")
        self._ids = named.get("input_ids", inputs[0] if inputs else None)
        self._mask = None if mask is None or mask.dim() != 2 else mask
        self._last = None if self._mask is None else self._mask.long().cumsum(-1).argmax(-1)
        self._earlier = 0 if self._cache is None else self._cache.get_seq_length()
        if self._cache is not None and self._earlier == 0:
            self._cache.wise_choice = None

    @property
    def decided(self) -> bool:
        """Whether these rows' prompts were read in an earlier pass."""
        return getattr(self._cache, "wise_choice", None) is not None

    def answering(self, keys: Tensor) -> Tensor:
        """Which tokens of (B, T, d_ff) come after their row's prompt: (B, T)."""
        if self.decided:
            return torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        return torch.arange(keys.shape[1], device=keys.device) > self._ends(keys)

    def named(self, names: Names | None, keys: Tensor) -> Tensor | None:
        """Which edits' subjects each row's prompt names: (B, 1, M); nothing where that has no say.

        Raises:
            ValueError: the model was given embeddings in the place of tokens.
        """
        if names is None or self.decided:
            return None
        if self._ids is None:
            raise ValueError("this model's edits open for prompts that name their subjects: give it input_ids")
        prompt = torch.arange(keys.shape[1], device=keys.device) <= self._ends(keys)
        if self._mask is not None:
            prompt = prompt & self._mask[:, -keys.shape[1] :].bool()
        found: Tensor = names(self._ids, prompt)
        return found[:, None]

    def hold(self, chosen: Tensor) -> Tensor:
        """The row's own choice from its last prompt token on: (B, T) → (B, T)."""
        row: Tensor | None = getattr(self._cache, "wise_choice", None)
        if row is not None:
            return row.expand_as(chosen)
        last = self._ends(chosen)
        row = chosen.gather(1, last)
        if self._cache is not None:
            self._cache.wise_choice = row
        return row.where(torch.arange(chosen.shape[1], device=chosen.device) >= last, UNROUTED)

    def _ends(self, rows: Tensor) -> Tensor:
        """The column of each row's last prompt token: (B, T, ...) → (B, 1)."""
        if self._last is None:
            return torch.full((len(rows), 1), rows.shape[1] - 1, device=rows.device)
        return (self._last - self._earlier)[:, None]
