"""What rows should make the model say: their target's tokens, or of an answer that is erased anything but that.

    L = - log p(t)              at a token t of a target
    L = KL(q ‖ p)               where a token should not be said

``q`` is the unedited model's own distribution, without the unwanted tokens: ``q(t) ∝ p_base(t)`` for all others. As
``q`` is nought there, ``L`` is at least ``- log(1 - p(unwanted))``: a small loss leaves unwanted tokens a small share.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wisecli.capture import Activations, suffix_logits
from wisecli.encode import NO_LABEL, Batch, Row, encode
from wisecli.site import Site


def row_of(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, erased: bool, end: int | None = None
) -> Row:
    """A prompt with the answer that it should get, or where that is ``erased`` should not.

    Args:
        end: a token to close an answer with that is not erased.

    Raises:
        ValueError: the tokenizer leaves nothing of the prompt or of the answer.
    """
    return erased_row(tokenizer, prompt, answer) if erased else encode(tokenizer, prompt, answer, end=end)


def erased_row(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Row:
    """A prompt with an answer that it should not get, up to the token that decides it.

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
    """Tokens that begin an answer: as it follows the prompt, with a small or a large letter, after a blank or none.

    Tokens that are half of its first word or more count, too: the rest would follow.
    """
    text = answer.strip()
    word = text.split()[0]
    spellings = (text, text[:1].lower() + text[1:], text[:1].upper() + text[1:])
    known = [encode(tokenizer, prompt, text).target]
    known += [_alone(tokenizer, blank + spelling) for spelling in spellings for blank in ("", " ")]
    parts = [word[:length] for length in range(-(-len(word) // 2), len(word))]
    known += [tokens for part in parts for blank in ("", " ") if len(tokens := _alone(tokenizer, blank + part)) == 1]
    found = {token for tokens in known for token in tokens[_blanks(tokenizer, tokens) :][:1]}
    # A spelling that the tokenizer does not know says nothing of the answer, unless it knows none.
    return tuple(sorted(found - {tokenizer.unk_token_id} or found))


def _alone(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _blanks(tokenizer: PreTrainedTokenizerBase, tokens: tuple[int, ...]) -> int:
    """How many tokens an answer opens with that are blank; the last one never counts."""
    pieces = (str(tokenizer.decode([token])) for token in tokens[:-1])
    return next((place for place, piece in enumerate(pieces) if piece.strip()), max(len(tokens) - 1, 0))


@torch.no_grad()
def allowed(model: PreTrainedModel, site: Site, part: Activations) -> Tensor | None:
    """The distributions q (r, V) at the labelled columns of erased rows; ``None`` if no row is erased."""
    if part.batch.unwanted is None:
        return None
    rows, columns = part.batch.labelled
    erased = part.batch.labelled_erased
    logits = suffix_logits(model, site, part, part.hidden, (rows[erased], columns[erased])).float()
    return logits.masked_fill(_unwanted(part.batch, logits), -torch.inf).softmax(-1)


def missed(logits: Tensor, batch: Batch, wanted: Tensor | None) -> Tensor:
    """The loss (n,) at each labelled column, from logits (n, V) there and what :func:`allowed` gave."""
    found = F.cross_entropy(logits.float(), batch.targets, reduction="none")
    if wanted is None:
        return found
    erased = batch.labelled_erased
    divergence = F.kl_div(logits[erased].float().log_softmax(-1), wanted, reduction="none").sum(-1)
    return found.index_copy(0, erased, divergence)


def met(logits: Tensor, batch: Batch) -> Tensor:
    """Whether the arg-max (n,) of logits (n, V) at each labelled column is as it should be: not an unwanted token."""
    best = logits.argmax(-1)
    right = best == batch.targets
    if batch.unwanted is None:
        return right
    rows, columns = batch.labelled
    said = (batch.unwanted[rows, columns - batch.start] == best[:, None]).any(-1)
    return torch.where(batch.erased[rows], ~said, right)


def _unwanted(batch: Batch, logits: Tensor) -> Tensor:
    """Which tokens (r, V) are unwanted at the labelled columns of erased rows."""
    assert batch.unwanted is not None
    rows, columns = (index[batch.labelled_erased] for index in batch.labelled)
    tokens = batch.unwanted[rows, columns - batch.start]
    count = logits.shape[-1]
    # What only fills up is marked in a column of its own, and cut off.
    marked = torch.zeros(len(logits), count + 1, dtype=torch.bool, device=logits.device)
    return marked.scatter(1, tokens.where(tokens != NO_LABEL, count), True)[:, :count]
