"""Where prompts end, and the window of tokens that a decision reads: functions of token ids alone.

Needs torch only; exports carry this very file.

A *window* is a prompt itself if it has no more than ``WINDOW`` tokens. Of a longer one it is the first token, which
attention rests on, and the last ``WINDOW - 1`` tokens. A decision is made from the window and nothing else, so it is
the same however the prompt is run: in chunks, behind a cached prefix, in a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokens that a decision reads.
WINDOW = 1024
# What configs call the number of places of a model.
_PLACES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
UNROUTED = -1
# Stands for a token of which nothing is known, and for padding.
NO_TOKEN = -1


@dataclass(frozen=True)
class TurnMarks:
    """The tokens by which a chat template marks turns.

    ``opener_token_ids`` begin an assistant's turn: a prompt ends behind them. ``turn_token_ids`` are the special tokens
    among them that no bare text begins with: a row that holds one is a chat. ``special_token_ids`` are all special
    tokens: one of them ends an answer. All are empty for a model without a chat template.
    """

    opener_token_ids: tuple[int, ...] = ()
    turn_token_ids: tuple[int, ...] = ()
    special_token_ids: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, list[int]]:
        """Return the marks as JSON."""
        return {name: list(getattr(self, name)) for name in TurnMarks.__dataclass_fields__}

    @classmethod
    def from_dict(cls, marks: dict[str, Any] | None) -> TurnMarks:
        """Return the inverse of :meth:`as_dict`; no marks for ``None``."""
        return cls(**{name: tuple(map(int, tokens)) for name, tokens in (marks or {}).items()})

    def opened(self, ids: Tensor, earlier: Tensor) -> Tensor:
        """Return which tokens (B, T) complete an opener, with the tokens before them (B, P): (B, T)."""
        size = len(self.opener_token_ids)
        if not size:
            return torch.zeros_like(ids, dtype=torch.bool)
        tail = earlier[:, max(0, earlier.shape[1] - size + 1) :]
        padded = torch.nn.functional.pad(torch.cat([tail, ids], 1), (size - 1 - tail.shape[1], 0), value=NO_TOKEN)
        found: Tensor = (padded.unfold(1, size, 1) == ids.new_tensor(self.opener_token_ids)).all(-1)
        return found

    def chats(self, ids: Tensor) -> Tensor:
        """Return which rows of token ids (B, T) are chats: (B,)."""
        return is_any(ids, self.turn_token_ids).any(1)

    def ends_in(self, ids: Tensor, non_padding: Tensor) -> Tensor:
        """Return the column of each prompt's last token (B,), from token ids (B, T) and the mask of padding (B, T).

        It is the end of the last assistant turn's opener if no special token follows it, so that an answer that is
        begun in the prompt belongs to the answer; else a row's last token.
        """
        empty = ids[:, :0]
        opened = last_marked(self.opened(ids, empty) & non_padding)
        broken = last_marked(is_any(ids, self.special_token_ids) & non_padding)
        return torch.where((opened >= 0) & (opened >= broken), opened, last_marked(non_padding))


def is_any(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Return which of token ids (...) are one of some tokens: (...)."""
    if not tokens:
        return torch.zeros_like(ids, dtype=torch.bool)
    return torch.isin(ids, ids.new_tensor(tokens))


def last_marked(marked: Tensor) -> Tensor:
    """Return the last marked column of each row (B, T), -1 without one: (B,)."""
    column = torch.arange(marked.shape[1], device=marked.device)
    return torch.where(marked, column, -1).amax(1) if marked.shape[1] else marked.new_full((len(marked),), -1).long()


def window_size(config: Any) -> int:
    """Return how many tokens of a prompt a decision reads: ``WINDOW``, or as many as the model has positions for.

    Args:
        config: of the model, as transformers has it.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = (getattr(text, name, None) for name in _PLACES)
    return min([WINDOW, *(one for one in known if isinstance(one, int) and one > 1)])


def windows(ids: Tensor, non_padding: Tensor, end: Tensor, size: int = WINDOW) -> tuple[Tensor, Tensor]:
    """Return the windows of prompts, padded on the right: token ids (B, W), and which are no padding (B, W).

    Args:
        ids: tokens of whole prompts and of what follows them (B, T).
        non_padding: which of them are known and no padding (B, T).
        end: the column of each prompt's last token (B,); a row with a negative one has an empty window.
        size: how many tokens a window has at most.
    """
    column = torch.arange(ids.shape[1], device=ids.device)
    prompt = non_padding & (column <= end[:, None])
    place = prompt.long().cumsum(1) - 1
    behind = place[:, -1:] - place
    kept = prompt & ((behind < size - 1) | (place == 0))
    width = max(1, int(kept.sum(1).max()))
    order = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    there = kept.gather(1, order)
    return ids.gather(1, order).where(there, 0), there


def window_of(tokens: list[int], size: int = WINDOW) -> list[int]:
    """Return the window of one prompt's tokens, of which it has so many at most."""
    return tokens if len(tokens) <= size else [*tokens[:1], *tokens[1 - size :]]


@dataclass(frozen=True)
class Answering:
    """Which memory answers rows, and from where on.

    ``memory`` (B,) is a memory's number, ``UNROUTED`` for none; ``end`` (B,) the column of the prompt's last token,
    counted from a row's first column.
    """

    memory: Tensor
    end: Tensor

    def packed(self) -> Tensor:
        """Return both as one tensor (B, 2), which ``generate()`` repeats for beams as it repeats all tensors."""
        return torch.stack([self.memory, self.end], 1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Answering:
        """Return the inverse of :meth:`packed`."""
        return cls(packed[:, 0], packed[:, 1])


@dataclass(frozen=True)
class Tokens:
    """What a pass' router knows of its rows' tokens before it decides.

    ``ids`` (B, T) are the pass' tokens, ``non_padding`` (B, T) marks those that are no padding; ``earlier`` (B, P) are
    the tokens before them, ``NO_TOKEN`` where they are unknown; ``memory`` (B,) is what answered the last of those.
    """

    ids: Tensor
    non_padding: Tensor
    earlier: Tensor
    memory: Tensor

    @property
    def whole(self) -> Tensor:
        """All tokens (B, P + T)."""
        return torch.cat([self.earlier, self.ids.where(self.non_padding, NO_TOKEN)], 1)

    def prompt_ends(self, marks: TurnMarks) -> Tensor:
        """Return the column (B,) of this pass in which a prompt ends, the last one if several do; -1 for none.

        In a chat a prompt ends behind the opener of the assistant's turn. In a bare text nothing marks its end: a pass
        of several tokens, or the first pass of all, is taken for a prompt, and one more token for part of its answer.
        """
        ends = last_marked(marks.opened(self.ids, self.earlier) & self.non_padding)
        if self.ids.shape[1] > 1 or not self.earlier.shape[1]:
            bare = ~marks.chats(self.whole)
            ends = torch.where(bare & (ends < 0), last_marked(self.non_padding), ends)
        return ends

    def places(self, answering: Answering) -> Tensor:
        """Return how far behind its prompt's last one each token of a pass stands, 0 or less up to that: (B, T)."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) - answering.end[:, None]

    def answered_by(self, marks: TurnMarks, answering: Answering, *, whole: bool = False) -> Tensor:
        """Return the memory that answers each token (B, T), until a special token or the next prompt ends the answer.

        Args:
            answering: what the pass' rows decided; ``end`` counts from its first column. A row in which it is negative
                goes on with what it did before; one in which it lies behind the pass has but a part of its prompt here.
            whole: whether a memory answers its prompt's tokens, too.
        """
        width = self.ids.shape[1]
        column = torch.arange(width, device=self.ids.device)
        broken = (is_any(self.ids, marks.special_token_ids) & self.non_padding).long().cumsum(1)
        end, memory = answering.end[:, None], answering.memory[:, None]
        at_end = broken.gather(1, end.clamp(0, width - 1))
        before = self.memory[:, None].where(broken == 0, UNROUTED)
        prompt = memory if whole else torch.full_like(memory, UNROUTED)
        answer = memory.where(broken == at_end, UNROUTED)
        return torch.where(end < 0, before, torch.where(column < end, prompt, answer))
