"""Finds the edit that a prompt means, by late interaction of early states. Needs torch only; exports carry this file.

How a prompt ends depends on its form: a question, a chat template, a paragraph before it. What it asks about does not:
a form adds tokens and takes none away. So every token of an edit's own prompt looks for the token of a prompt that is
most like it (ColBERT's MaxSim, arXiv 2004.12832), twice: under a projection that tells subjects apart, and under one
that tells relations apart. An edit is meant where both are found:

    s_h(e) = Σ_t weight_t · max_s cos(z_h(e_t), z_h(q_s))          h: subject, relation
    p(e)   = Π_h sigmoid(scale_h · (s_h(e) - offset_h))

with ``z_h = A_h x + c_h`` of the states x that leave an early layer.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Tensors that say what edits mean.
LATE_INTERACTION = tuple(
    f"late_interaction.{part}"
    for part in (
        "proj_weight",
        "proj_bias",
        "logit_scale",
        "logit_offset",
        "prompt_token_embeddings",
        "token_to_prompt",
        "token_weights",
        "prompt_to_edit",
        "special_token_ids",
    )
)
# So many of a prompt's last tokens are compared.
MAX_COMPARED_TOKENS = 1024
# A stretch between special tokens is what is asked if it has so many tokens: a role's name has fewer.
_MIN_TURN_TOKENS = 4
# So many of a user's turns before the last one are looked at, where that one leaves something open.
_MAX_EARLIER_TURNS = 2
# Comparisons that are held at a time; and so many tokens are compared at a time that the outcome stays near the core.
_MAX_COMPARISONS, _TOKENS = 1 << 24, 2048
# An edit whose subject is less likely than this is not what is asked, whatever its relation; but so many kept prompts
# are always compared whole, as the likeliest of all edits is shown to those who ask why none opened.
HOPELESS, MIN_COMPARED_PROMPTS = 0.25, 8


class ProjectedPrompts(NamedTuple):
    """What is compared of B prompts: unit vectors ``projected`` (2, B, W, k), and which of them are ``mask`` (B, W)."""

    projected: Tensor
    mask: Tensor


class LateInteraction(nn.Module):
    """The tokens of edits' prompts, and how likely a prompt means each edit.

    ``proj_weight`` (2, k, d) and ``proj_bias`` (2, k) are the projections A and c of subject and relation;
    ``logit_scale`` (2,) and ``logit_offset`` (2,) make probabilities of scores. ``prompt_token_embeddings`` (n, k) are
    the projected tokens of edits' prompts, and ``token_to_prompt`` (n,) the prompt that each is of, of g prompts twice:
    those below g are looked for as subjects, the others, g higher, as relations. ``token_weights`` (n,) add up to 1 a
    prompt and projection. ``prompt_to_edit`` (g,) is the edit of each prompt; several may be of one.
    ``special_token_ids`` are the tokenizer's special tokens, ascending.

    Args:
        tensors: all of ``LATE_INTERACTION``; they become buffers.
        edits: how many edits there are, M.
    """

    proj_weight: Tensor
    proj_bias: Tensor
    logit_scale: Tensor
    logit_offset: Tensor
    prompt_token_embeddings: Tensor
    token_to_prompt: Tensor
    token_weights: Tensor
    prompt_to_edit: Tensor
    special_token_ids: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], edits: int) -> None:
        super().__init__()
        self.edits = edits
        for name in LATE_INTERACTION:
            tensor = tensors[name]
            self.register_buffer(
                name.removeprefix("late_interaction."), tensor.float() if tensor.is_floating_point() else tensor
            )

    def forward(self, states: Tensor, compared: Tensor) -> Tensor:
        """Return the probability that prompts mean each edit: states (B, T, d), compared tokens (B, T) → (B, M)."""
        return self.edit_probs(self.project(states, compared))

    def project(self, states: Tensor, compared: Tensor) -> ProjectedPrompts:
        """Return the compared tokens (B, T) of states (B, T, d) under both projections."""
        order, mask = marked_to_front(compared)
        near = states.gather(1, order[..., None].expand(-1, -1, states.shape[-1])).float()
        # Whatever type the model is turned into: half precision is too coarse for what is compared.
        heads = zip(self.proj_weight.float(), self.proj_bias.float(), strict=True)
        projected = [F.linear(near, *head) for head in heads]
        return ProjectedPrompts(F.normalize(torch.stack(projected), dim=-1), mask)

    def edit_tokens(self, edits: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the projected tokens of edits' prompts as they are written: of each the subject's and the others'.

        Args:
            edits: their numbers (e,).

        Returns:
            For each edit (t, k) twice; without a row if no prompt of it is kept.
        """
        count = len(self.prompt_to_edit)
        prompts = torch.arange(count, device=self.prompt_to_edit.device)
        first = prompts.new_full((self.edits,), 2 * count).scatter_reduce(0, self.prompt_to_edit, prompts, "amin")[
            edits
        ]
        wanted, place = torch.cat([first, first + count]).unique(return_inverse=True)
        rows = torch.isin(self.token_to_prompt, wanted).nonzero().flatten()
        found = torch.searchsorted(wanted, self.token_to_prompt[rows])
        embeddings = self.prompt_token_embeddings[rows[found.argsort(stable=True)]].float()
        parts = embeddings.split(torch.bincount(found, minlength=len(wanted)).tolist())
        subject, relation = place.view(2, -1).tolist()
        return [(parts[one], parts[other]) for one, other in zip(subject, relation, strict=True)]

    def edit_probs(self, query: ProjectedPrompts, last: Tensor | None = None) -> Tensor:
        """Return the probability that prompts mean each edit: (B, M); 0 where its subject is far from all tokens.

        Args:
            last: which tokens (B, W) are of the last turn; of subject and relation it must then hold one, and the other
                may be in a turn before it.
        """
        width = query.mask.shape[1]
        compared = min(len(self.prompt_token_embeddings), _TOKENS) * width
        rows = max(1, _MAX_COMPARISONS // max(1, len(self.prompt_to_edit), compared))
        parts = zip(query.projected.split(rows, 1), query.mask.split(rows), strict=True)
        later = itertools.repeat(None) if last is None else last.split(rows)
        return torch.cat(
            [self._edit_probs(ProjectedPrompts(*part), own) for part, own in zip(parts, later, strict=False)]
        )

    def _edit_probs(self, query: ProjectedPrompts, last: Tensor | None) -> Tensor:
        prompts = len(self.prompt_to_edit)
        probs = query.projected.new_zeros(len(query.mask), self.edits)
        if not prompts or not query.mask.shape[1]:
            return probs
        every = torch.arange(prompts, device=self.prompt_to_edit.device)
        subject_log_probs = self.log_probs(query, 0, every)
        least = subject_log_probs.topk(min(MIN_COMPARED_PROMPTS, prompts)).values[:, -1:].clamp(max=math.log(HOPELESS))
        close = subject_log_probs >= least
        some = close.any(0).nonzero().flatten()
        both = subject_log_probs[:, some] + self.log_probs(query, 1, some)
        if last is not None:
            last_turn = query._replace(mask=query.mask & last)
            subject, relation = self.log_probs(last_turn, 0, some), self.log_probs(last_turn, 1, some)
            both = (subject_log_probs[:, some] + relation).maximum(subject + both - subject_log_probs[:, some])
        both = both.exp() * close[:, some]
        return probs.scatter_reduce(1, self.prompt_to_edit[some].expand_as(both), both, "amax")

    def edit_prob(self, query: ProjectedPrompts, edit: int) -> Tensor:
        """Return the probability that prompts mean one edit: (B,); 0 if no prompt of the edit is kept."""
        prompts = (self.prompt_to_edit == edit).nonzero().flatten()
        both = self.log_probs(query, 0, prompts) + self.log_probs(query, 1, prompts)
        return F.pad(both.exp(), (1, 0)).amax(1)

    def log_probs(self, query: ProjectedPrompts, head: int, prompts: Tensor) -> Tensor:
        """Return log-probabilities that the subject (head 0) or relation (1) of kept prompts (p,) is found: (B, p)."""
        count, width = query.mask.shape
        projected = query.projected[head].transpose(0, 1).flatten(0, 1).T  # (k, W · B)
        missing = None if bool(query.mask.all()) else ~query.mask.T
        scores = projected.new_zeros(len(prompts), count)
        for rows, prompt in self._tokens_of(head, prompts):
            cosines = (self.prompt_token_embeddings[rows].float() @ projected).view(-1, width, count)
            near = (cosines if missing is None else cosines.masked_fill_(missing, -1.0)).amax(1)
            scores.index_add_(0, prompt, near * self.token_weights[rows, None].float())
        return F.logsigmoid(self.logit_scale[head].float() * (scores.T - self.logit_offset[head].float()))

    def _tokens_of(self, head: int, prompts: Tensor) -> Iterator[tuple[Tensor | slice, Tensor]]:
        """Yield the rows of the tokens by which kept prompts (p,) are found, some at a time, and each one's place.

        Those of all prompts that lie one behind the other are a slice, as gathering takes longer than comparing.
        """
        kept = len(self.prompt_to_edit)
        subjects = self.token_to_prompt < kept
        if len(prompts) == kept:
            edge = int(subjects.sum())
            first, last = (0, edge) if head == 0 else (edge, len(subjects))
            if bool(subjects[:edge].all()):
                parts = (slice(start, min(start + _TOKENS, last)) for start in range(first, last, _TOKENS))
                yield from ((part, self.token_to_prompt[part] - head * kept) for part in parts)
                return
        index = torch.full((2 * kept,), -1, device=prompts.device)
        index[prompts + head * kept] = torch.arange(len(prompts), device=prompts.device)
        prompt_of_token = index[self.token_to_prompt]
        for rows in (prompt_of_token >= 0).nonzero().flatten().split(_TOKENS):
            yield rows, prompt_of_token[rows]


def marked_to_front(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of each row with the marked ones first, and which of these are marked: (B, W) twice."""
    width = int(marked.sum(1).max()) if len(marked) else 0
    order = marked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : max(width, 1)]
    return order, marked.gather(1, order)


def compared_tokens(ids: Tensor, prompt: Tensor, first: Tensor, special_ids: Tensor) -> Tensor:
    """Return which tokens of prompts are compared (B, T): the last ones of their last turn.

    A chat template's special tokens part what is asked from earlier turns.

    Args:
        ids: tokens (B, T).
        prompt: which of them are of prompts (B, T).
        first: which is the first of all, the attention's sink (B, T).
        special_ids: special tokens.
    """
    special = torch.isin(ids, special_ids) & prompt
    words = prompt & ~special & ~first
    # A prompt of one token has no other.
    words = torch.where(words.any(1, keepdim=True), words, prompt)
    stretch = special.long().cumsum(1)
    size = words.new_zeros(len(ids), ids.shape[1] + 1, dtype=torch.long).scatter_add(1, stretch, words.long())
    long = size.gather(1, stretch) >= _MIN_TURN_TOKENS
    last_turn = torch.where(words & long, stretch, -1).amax(1, keepdim=True)
    compared = words & ((stretch == last_turn) | (last_turn < 0))
    tokens_to_end = compared.long().flip(1).cumsum(1).flip(1)
    return compared & (tokens_to_end <= MAX_COMPARED_TOKENS)


def starts_with_word(ids: Tensor, non_padding: Tensor, compared: Tensor, special_ids: Tensor) -> Tensor:
    """Return whether the first token of each prompt is a word, and no special token: (B,).

    Args:
        ids: tokens (B, T).
        non_padding: which of them are no padding (B, T).
        compared: which of them are compared (B, T).
        special_ids: special tokens.
    """
    first = non_padding.to(torch.int8).argmax(1, keepdim=True)
    word = non_padding.any(1, keepdim=True) & ~torch.isin(ids.gather(1, first), special_ids)
    follows = compared.gather(1, (first + 1).clamp(max=ids.shape[1] - 1)) & ~compared.gather(1, first)
    return (word & follows)[:, 0]


def earlier_turn_tokens(ids: Tensor, non_padding: Tensor, last_turn: Tensor, special_ids: Tensor) -> Tensor:
    """Return which tokens (B, T) are of the last turns of the same role before the last one.

    A turn's role is what it begins with: a special token and the word behind it, or one between two of them.

    Args:
        ids: tokens (B, T).
        non_padding: which of them are no padding (B, T).
        last_turn: which of them are of the last turn (B, T).
        special_ids: special tokens.
    """
    special = torch.isin(ids, special_ids) & non_padding
    turn = special.long().cumsum(1)
    count = int(turn.max()) + 1 if turn.numel() else 1
    size = ids.new_zeros(len(ids), count).scatter_add(1, turn, (non_padding & ~special).long())
    # Of each turn: the token that opens it, and the first of its words.
    opens = ids.new_full((len(ids), count), -1).scatter(1, turn.where(special, 0), ids.where(special, -1))
    first = non_padding & ~special & F.pad(special[:, :-1], (1, 0))
    words = ids.new_full((len(ids), count + 1), -1).scatter(1, turn.where(first, count), ids.where(first, -1))[:, :-1]
    before = F.pad(words.where(size < _MIN_TURN_TOKENS, -1)[:, :-1], (1, 0), value=-1)
    last = torch.where(last_turn, turn, 0).amax(1, keepdim=True)
    last_role = [one.gather(1, last) for one in (opens, words, before)]
    alike = (
        (opens == last_role[0])
        & (words == last_role[1])
        & ((before == last_role[2]) | (before < 0) | (last_role[2] < 0))
    )
    alike &= (torch.arange(count, device=ids.device) < last) & (size >= _MIN_TURN_TOKENS) & (opens >= 0)
    recent = alike & (alike.long().flip(1).cumsum(1).flip(1) <= _MAX_EARLIER_TURNS)
    return recent.gather(1, turn) & non_padding & ~special & last_turn.any(1, keepdim=True)
