"""What sequence routing knows of prompts: where they end, what they name or mean, and what they decided.

Needs torch only; exports carry this very file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .meaning import Asked, Meaning, looked_at
from .spelling import Spelling, behind

UNROUTED = -1
# How much of a subject a prompt must hold, of its tokens, each by how rare it is in unrelated text: three fifths where
# its end decides, three quarters where what it means does, which takes names for others that are like them.
NAMED, NAMED_AND_MEANT = 0.6, 0.75
# Tensors that say which tokens name the subject of which edit.
NAMES = tuple(f"names.{part}" for part in ("tokens", "words", "whose", "named", "naming", "shares"))


class Names(nn.Module):
    """The tokens that edits' subjects are written with.

    ``tokens`` (v,) ascending, and the word that each spells, ``words`` (v,) below v; several tokens may spell one,
    with a capital or a space before it. Names (g,) are of the edits ``whose`` (g,); several may be of one, as a
    tokenizer splits capitals otherwise. An edit without a name is named by every prompt. Name ``named`` (q,) has the
    word ``naming`` (q,), as ``shares`` (q,) of the whole, which add up to 1 a name.

    Args:
        tensors: all of ``NAMES``; they become buffers.
        edits: how many edits there are, M.
        least: how much of a name a prompt must hold.
    """

    tokens: Tensor
    words: Tensor
    whose: Tensor
    named: Tensor
    naming: Tensor
    shares: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], edits: int, least: float = NAMED) -> None:
        super().__init__()
        self.edits, self.least = edits, least
        for name in NAMES:
            self.register_buffer(name.removeprefix("names."), tensors[name])

    def forward(self, ids: Tensor, prompt: Tensor) -> Tensor:
        """Which edits' subjects are named in rows: token ids (B, T), and which belong to prompts (B, T) → (B, M)."""
        return self.of(self.held(ids, prompt))

    def held(self, ids: Tensor, prompt: Tensor) -> Tensor:
        """Which words rows of token ids (B, T) hold, at the tokens that ``prompt`` (B, T) marks: 0 or 1, (B, v)."""
        place = torch.searchsorted(self.tokens, ids.contiguous()).clamp(max=len(self.tokens) - 1)
        known = (self.tokens[place] == ids) & prompt
        words = self.shares.new_zeros(len(ids), len(self.tokens) + 1, dtype=torch.float32)
        return words.scatter(1, self.words[place].where(known, len(self.tokens)), 1.0)[:, :-1]

    def of(self, words: Tensor) -> Tensor:
        """The edits whose subjects rows with these words (B, v) name: (B, M)."""
        share = words.new_zeros(len(words), len(self.whose))
        share = share.index_add(1, self.named, words[:, self.naming] * self.shares.float())
        named = words.new_ones(len(words), self.edits).index_fill(1, self.whose, 0.0)
        return named.index_add(1, self.whose, (share > self.least - 1e-4).to(words.dtype)) > 0


@dataclass(frozen=True)
class Prompt:
    """What is known of the prompts of a pass' rows.

    ``end`` (B, 1) is the column of each row's last prompt token, below 0 for a row that has none in this pass;
    ``None`` says that all rows' prompts were read before. ``held`` (B, 1) is what an earlier pass decided. ``named``
    (B, 1, M) marks the edits whose subjects the prompts name; ``None`` where that has no say. ``real`` (B, T) marks
    tokens that are no padding; ``None`` where padding does no harm. ``sure`` (B, M) is how surely the prompts mean each
    edit; ``None`` where that has no say. ``letters`` (B, W, c) are those of what is asked; ``None`` where a slip in a
    name does not count.
    """

    end: Tensor | None
    held: Tensor | None = None
    named: Tensor | None = None
    real: Tensor | None = None
    sure: Tensor | None = None
    letters: Tensor | None = None

    @property
    def meant(self) -> Tensor:
        """How surely the prompts mean each edit (B, M): 0 for one whose subject they do not name."""
        assert self.sure is not None, "the prompts of this pass have been read"
        return self.sure if self.named is None else self.sure * self.named[:, 0]

    def after(self, column: Tensor) -> Tensor:
        """Which columns (T,) come after their row's prompt: (B or 1, T)."""
        return (column >= 0)[None] if self.end is None else column > self.end

    def answers(self, column: Tensor) -> Tensor:
        """Which columns (T,) say what comes after the prompt, its last token among them: (B or 1, T)."""
        return (column >= 0)[None] if self.end is None else column >= self.end


@dataclass(frozen=True)
class Decided:
    """What is kept with an attention cache.

    ``choice`` (B, 1) is what each row's prompt decided, ``words`` (B, v) are those of the subjects that it holds so
    far, ``asked`` what is compared of it, ``letters`` (B, W, c) how that is spelt, and ``answering`` says whether the
    answer has begun: what comes in several tokens after that is a new prompt.
    """

    choice: Tensor
    words: Tensor | None
    asked: Asked | None = None
    letters: Tensor | None = None
    answering: bool = False


def cache_given(named: dict[str, Any]) -> Any:
    """The attention cache among the arguments of a model's pass; None without one.

    ``transformers`` calls it ``cache`` from 5.24 on, and ``past_key_values`` before.
    """
    return named.get("cache", named.get("past_key_values"))


def cache_returned(output: Any) -> Any:
    """The attention cache in what a model or its ``generate()`` returns; None without one. Both names, as above."""
    return output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)


class PromptGate:
    """The one owner of what sequence routing remembers from pass to pass, which lies with the attention cache.

    A pass of one token goes on with what its rows' prompts decided; a pass of several is a prompt, or more of one, and
    decides anew. So the second question of a conversation is decided by itself, on the cache of the first.

    Args:
        averaging: whether means over prompts decide, in which padding must not count.
    """

    def __init__(self, *, averaging: bool = False) -> None:
        self.averaging = averaging
        self._cache: Any = None
        self._last: Tensor | None = None
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._words: Tensor | None = None
        self._states: Tensor | None = None
        self._asked: Asked | None = None
        self._letters: Tensor | None = None
        self._earlier = 0
        self._kept: Decided | None = None

    def before_forward(self, _model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Forward pre-hook of the model: notes the cache, the tokens, and where each row's prompt ends.

        Raises:
            ValueError: earlier tokens lie in a cache that is not seen, with what their prompts decided.
        """
        mask, self._cache = named.get("attention_mask"), cache_given(named)
        self._ids = named.get("input_ids", inputs[0] if inputs else None)
        self._mask = None if mask is None or mask.dim() != 2 else mask
        seen = 0 if self._mask is None else self._mask.shape[1]
        if self._cache is None and self._ids is not None and seen > self._ids.shape[1]:
            raise ValueError(
                "the attention mask is longer than the tokens, and there is no attention cache by a name that this "
                "code knows: what the prompt decided would be lost; export the edits again with a newer wise"
            )
        self._last = None if self._mask is None else self._mask.long().cumsum(-1).argmax(-1)
        self._earlier = 0 if self._cache is None else self._cache.get_seq_length()
        self._kept = None
        if self._cache is not None and self._earlier == 0:
            self._cache.wise_decided = None

    def after_forward(self, _model: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model: a cache that it made itself gets what was decided."""
        cache = cache_returned(output)
        if self._cache is None and cache is not None and self._kept is not None:
            cache.wise_decided = self._kept

    def note_states(self, _layer: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the layer whose states say what a prompt means."""
        self._states = output[0] if isinstance(output, tuple) else output

    def prompt(
        self, names: Names | None, keys: Tensor, meaning: Meaning | None = None, spelling: Spelling | None = None
    ) -> Prompt:
        """What is known of the prompts of a pass over keys (B, T, d_ff).

        Raises:
            ValueError: the model was given embeddings in the place of tokens, and its edits ask for tokens.
        """
        before: Decided | None = getattr(self._cache, "wise_decided", None)
        if before is not None and keys.shape[1] == 1:
            self._words, self._asked, self._letters, self._states = before.words, None, None, None
            return Prompt(None, before.choice)
        end = self._ends(keys)
        held = None if before is None else before.choice
        if names is None and meaning is None:
            counted = self._mask if self.averaging else None
            return Prompt(end, held, real=None if counted is None else counted[:, -keys.shape[1] :].bool())
        if self._ids is None:
            raise ValueError("this model's edits open for prompts that name their subjects: give it input_ids")
        prompt = torch.arange(keys.shape[1], device=keys.device) <= end
        if self._mask is not None:
            prompt = prompt & self._mask[:, -keys.shape[1] :].bool()
        earlier = None if before is None or before.answering else before
        sure = None if meaning is None else self._sure(meaning, prompt, earlier)
        named = None if names is None else self._named(names, prompt, earlier)
        letters = None if meaning is None or spelling is None else self._spelt(meaning, spelling, prompt, earlier)
        return Prompt(end, held, named, sure=sure, letters=letters)

    def _named(self, names: Names, prompt: Tensor, earlier: Decided | None) -> Tensor:
        """The edits whose subjects the prompts of a pass (B, T), with what was read of them before, name: (B, 1, M)."""
        assert self._ids is not None, "the model was given tokens"
        words = names.held(self._ids, prompt)
        if earlier is not None and earlier.words is not None:
            words = words.maximum(earlier.words)
        self._words = words
        return names.of(words)[:, None]

    def _sure(self, meaning: Meaning, prompt: Tensor, earlier: Decided | None) -> Tensor:
        """How surely the prompts of a pass (B, T), with what was read of them before, mean each edit: (B, M)."""
        assert self._ids is not None and self._states is not None, "the layer below has run"
        seen = prompt if self._mask is None else self._mask.bool()
        first = (seen.long().cumsum(1) == 1)[:, -prompt.shape[1] :]
        if self._mask is None and self._earlier:
            first = torch.zeros_like(prompt)
        asked = meaning.read(self._states, looked_at(self._ids, prompt, first, meaning.breaks))
        if earlier is not None and earlier.asked is not None:
            asked = asked.behind(earlier.asked)
        self._asked, self._states = asked, None
        return meaning.of(asked)

    def _spelt(self, meaning: Meaning, spelling: Spelling, prompt: Tensor, earlier: Decided | None) -> Tensor:
        """How that is spelt which the prompts of a pass (B, T), with what was read of them before, ask: (B, W, c)."""
        assert self._ids is not None, "the model was given tokens"
        # Attention rests on the first token of all, which may be of the name none the less.
        asked = looked_at(self._ids, prompt, torch.zeros_like(prompt), meaning.breaks)
        letters = spelling.read(self._ids, asked)
        if earlier is not None and earlier.letters is not None:
            letters = behind(earlier.letters, letters)
        self._letters = letters
        return letters

    def keep(self, prompt: Prompt, choice: Tensor) -> None:
        """Keep what a pass' rows decided (B, 1) with its cache."""
        self._kept = Decided(choice, self._words, self._asked, self._letters, answering=prompt.end is None)
        if self._cache is not None:
            self._cache.wise_decided = self._kept

    def _ends(self, rows: Tensor) -> Tensor:
        """The column of each row's last prompt token: (B, T, ...) → (B, 1)."""
        if self._last is None:
            return torch.full((len(rows), 1), rows.shape[1] - 1, device=rows.device)
        return (self._last - self._earlier)[:, None]
