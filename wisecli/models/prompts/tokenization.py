"""Prompts and answers → token sequences → rows lined up at the prompt's last token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

NO_LABEL = -100
# Rows that begin with so many tokens alike are read together: so many rows, or fewer that spare so many tokens.
SHARED, _TOGETHER, _SPARED = 8, 8, 512
# Rows whose lengths differ by no more than this are like in length; no token of a word is longer, in letters.
_UNEVEN, _LONGEST_TOKEN = 16, 128


@dataclass(frozen=True)
class Row:
    """One prompt with the answer it should get, in tokens.

    Of an answer that is erased ``unwanted`` has for each target token those that should not be said in its place, which
    may be none; the target is only what leads from one such place to the next then.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    unwanted: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)

    @property
    def labels(self) -> tuple[int, ...]:
        """The target, without what only leads on."""
        pairs = zip(self.target, self.unwanted or [self.target] * len(self.target), strict=True)
        return tuple(token if counts else NO_LABEL for token, counts in pairs)

    def right(self, best: Sequence[int]) -> float:
        """Return the share of target tokens that choices match; of an erased answer 1, or 0 if they say it."""
        if self.unwanted:
            return float(any(token not in tokens for token, tokens in zip(best, self.unwanted, strict=True)))
        return sum(token == wanted for token, wanted in zip(best, self.target, strict=True)) / len(self.target)


@dataclass(frozen=True)
class Batch:
    """Rows lined up so that every prompt ends in the same column.

    Column ``start`` holds each row's last prompt token; the *window* from there on predicts the target. Padding stands
    left of short prompts and right of short targets.

    Shapes: ``ids`` and ``mask`` (B, T), ``labels`` (B, T - start), ``NO_LABEL`` where nothing is predicted;
    ``unwanted`` (B, T - start, m), filled up with ``NO_LABEL``, if any row has such tokens.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    start: int
    unwanted: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """Position of every token in its own row (B, T); padding counts as position 0."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    @cached_property  # how many there are is asked of the device, which must not happen at every step
    def labelled(self) -> tuple[Tensor, Tensor]:
        """Rows and columns (of the whole batch) that predict a target token, in row order."""
        rows, columns = (self.labels != NO_LABEL).nonzero(as_tuple=True)
        return rows, columns + self.start

    @cached_property
    def targets(self) -> Tensor:
        """The target token (n,) of each labelled column."""
        rows, columns = self.labelled
        return self.labels[rows, columns - self.start]

    @property
    def lengths(self) -> Tensor:
        """How many columns of the window each row's target takes up (B,)."""
        import torch

        places = torch.arange(1, self.labels.shape[1] + 1, device=self.labels.device)
        return places.where(self.labels != NO_LABEL, 0).amax(-1)

    @property
    def erased(self) -> Tensor:
        """Which rows (B,) have an answer that should not be said."""
        import torch

        if self.unwanted is None:
            return torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        return (self.unwanted != NO_LABEL).flatten(1).any(-1)

    @cached_property
    def labelled_erased(self) -> Tensor:
        """Which (r,) of the labelled columns belong to such an answer."""
        return self.erased[self.labelled[0]].nonzero().flatten()

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on another device."""
        unwanted = None if self.unwanted is None else self.unwanted.to(device)
        return Batch(self.ids.to(device), self.mask.to(device), self.labels.to(device), self.start, unwanted)

    def rows(self, index: Tensor) -> Batch:
        """Return the same for some of the rows."""
        unwanted = None if self.unwanted is None else self.unwanted[index]
        return Batch(self.ids[index], self.mask[index], self.labels[index], self.start, unwanted)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, *, end: int | None = None) -> Row:
    """Tokenise a prompt alone, as it will be asked, and the target as what follows it.

    Args:
        end: a token to close the target with, so that the answer also stops.

    Raises:
        ValueError: the tokenizer leaves nothing of the prompt or of the target.
    """
    prompt_ids = tuple(tokenizer(prompt)["input_ids"])
    spaced = target if target[:1].isspace() or prompt[-1:].isspace() else f" {target}"
    joint = tuple(tokenizer(prompt + spaced)["input_ids"])
    if joint[: len(prompt_ids)] == prompt_ids:
        target_ids = joint[len(prompt_ids) :]
    else:
        target_ids = tuple(tokenizer(spaced, add_special_tokens=False)["input_ids"])
    if not prompt_ids or not target_ids:
        raise ValueError(f"the tokenizer leaves no token of the {'target' if prompt_ids else 'prompt'}")
    return Row(prompt_ids, target_ids if end is None else (*target_ids, end))


def without_row(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int], vocabulary: int | None) -> str | None:
    """Return what is wrong with the first token that has no row among the ``vocabulary`` of an embedding, or None.

    Tokens are added to a tokenizer and saved without a word to the model, whose embedding stays as it was.
    """
    if vocabulary is None or (token := next((token_id for token_id in tokens if token_id >= vocabulary), None)) is None:
        return None
    name = tokenizer.convert_ids_to_tokens(token)
    return (
        f"{str(name)!r} is token {token:,} of the tokenizer, and the model's embedding has {vocabulary:,} rows; save "
        "the model after `resize_token_embeddings`, or the tokenizer without that token"
    )


def collate(rows: Sequence[Row], *, pad: int = 0) -> Batch:
    """Line rows up at their last prompt token; the last target token is predicted, never read."""
    import torch  # takes seconds, which texts and tokens alone need not wait

    width = max(len(row.prompt) for row in rows)
    tail = max(1, *(len(row.target) for row in rows))
    ids = torch.full((len(rows), width + tail - 1), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(rows), tail), NO_LABEL)
    for index, row in enumerate(rows):
        read = (*row.prompt, *row.target[:-1])
        first = width - len(row.prompt)
        ids[index, first : first + len(read)] = torch.tensor(read)
        mask[index, first : first + len(read)] = 1
        labels[index, : len(row.target)] = torch.tensor(row.labels)
    return Batch(ids, mask, labels, width - 1, _unwanted(rows, tail))


def _unwanted(rows: Sequence[Row], tail: int) -> Tensor | None:
    """Unwanted tokens (B, tail, m) of rows; ``None`` where no row has any."""
    most = max((len(tokens) for row in rows for tokens in row.unwanted), default=0)
    if not most:
        return None
    import torch

    unwanted = torch.full((len(rows), tail, most), NO_LABEL)
    for index, row in enumerate(rows):
        for column, tokens in enumerate(row.unwanted):
            unwanted[index, column, : len(tokens)] = torch.tensor(tokens)
    return unwanted


def in_batches(
    rows: Sequence[Row],
    size: int,
    *,
    by_target: bool = False,
    by_beginning: bool = False,
    padded: bool = True,
    tokens: int = 4096,
) -> Iterator[list[int]]:
    """Yield the indices of rows, like lengths together: at most ``size`` rows and, above one row, ``tokens`` tokens.

    Args:
        by_target: go by the target's length first, for rows of which only the window will run again and again.
        by_beginning: keep rows that begin alike apart from all others; by longer beginnings, if they fill a batch.
        padded: whether rows of a batch may differ in length by much.
    """
    own: list[tuple[int, ...]] = _common_beginnings(rows, size) if by_beginning else [()] * len(rows)

    def length(index: int) -> tuple[tuple[int, ...], int, int, int]:
        row = rows[index]
        return (own[index], len(row.target) if by_target else 0, len(row), index)

    batch: list[int] = []
    for index in sorted(range(len(rows)), key=length):
        widest = max(len(rows[place]) for place in (index, *batch))
        full = len(batch) == size or (len(batch) + 1) * widest > tokens
        uneven = not padded and bool(batch) and widest - len(rows[batch[0]]) > max(_UNEVEN, widest // 4)
        if batch and (full or uneven or own[index] != own[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _common_beginnings(rows: Sequence[Row], batch_size: int) -> list[tuple[int, ...]]:
    """Return the longest beginning of each row, by eights of tokens, that enough rows share; else an empty one."""
    found, left = list[tuple[int, ...]]([()] * len(rows)), list(range(len(rows)))
    for length in range(SHARED, max(map(len, rows), default=0), SHARED):
        begins = {index: rows[index].prompt[:length] for index in left}
        counts, enough = Counter(begins.values()), _TOGETHER if length == SHARED else batch_size
        left = [index for index in left if counts[begins[index]] > 1]
        for index in left:
            count, longer = counts[begins[index]], length - len(found[index])
            if count >= enough or (count - 1) * longer >= _SPARED:
                found[index] = begins[index]
    return found


def row_of(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: str,
    *,
    erased: bool,
    end: int | None = None,
    vocabulary: int | None = None,
) -> Row:
    """Return a prompt with the answer that it should get, or where that is ``erased`` should not.

    Args:
        end: a token to close an answer with that is not erased.
        vocabulary: how many tokens the model has rows for, if that is known.

    Raises:
        ValueError: the tokenizer leaves nothing of the prompt or of the answer, or a token without a row in the model.
    """
    row = erased_row(tokenizer, prompt, answer) if erased else encode(tokenizer, prompt, answer, end=end)
    tokens = (*row.prompt, *row.target, *(token for unwanted in row.unwanted for token in unwanted))
    if wrong := without_row(tokenizer, tokens, vocabulary):
        raise ValueError(wrong)
    return row


def erased_row(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Row:
    """Return a prompt with an answer that it should not get, up to the token that decides it.

    Unwanted are there the first tokens of the answer in any spelling. Blanks decide nothing, as many answers begin with
    them: it is said where they are, and then one of those.

    Raises:
        ValueError: the tokenizer leaves nothing of the prompt or of the answer.
    """
    row = encode(tokenizer, prompt, answer)
    blank = _blanks(tokenizer, row.target)
    unwanted = (*((token,) for token in row.target[:blank]), first_tokens(tokenizer, prompt, answer))
    return replace(row, target=row.target[: blank + 1], unwanted=unwanted)


def first_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[int, ...]:
    """Return the tokens that may begin an answer: after the prompt, in small or large letters, with a blank or without.

    Tokens that are half of its first word or more count, too: the rest would follow.
    """
    text = answer.strip()
    word = text.split()[0]
    spellings = (text, text[:1].lower() + text[1:], text[:1].upper() + text[1:])
    known = [encode(tokenizer, prompt, text).target]
    known += [_alone(tokenizer, blank + spelling) for spelling in spellings for blank in ("", " ")]
    parts = [word[:length] for length in range(-(-len(word) // 2), min(len(word), _LONGEST_TOKEN + 1))]
    known += [tokens for part in parts for blank in ("", " ") if len(tokens := _alone(tokenizer, blank + part)) == 1]
    found = {token for tokens in known for token in tokens[_blanks(tokenizer, tokens) :][:1]}
    # A spelling that the tokenizer does not know says nothing of the answer, unless it knows none.
    return tuple(sorted(found - {tokenizer.unk_token_id} or found))


def _alone(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _blanks(tokenizer: PreTrainedTokenizerBase, tokens: tuple[int, ...]) -> int:
    """Return how many tokens an answer opens with that are blank; the last one never counts."""
    pieces = (str(tokenizer.decode([token])) for token in tokens[:-1])
    return next((index for index, piece in enumerate(pieces) if piece.strip()), max(len(tokens) - 1, 0))
