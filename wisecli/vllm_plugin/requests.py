"""Which memory answers each request, and so each token of a step. Needs torch only.

A request is decided once, when it comes in, from the token ids of its prompt. Afterwards a token's memory is a function
of the request, the token's position and whether a special token ended the answer before it: chunks, cached prefixes,
preemption and guessed tokens change nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wisecli.routing.deciding.decision import AnswerTokens
from wisecli.routing.deciding.prompt_window import UNROUTED, TurnMarks, is_any
from wisecli.routing.memories.answer_pairs import AnswerPairs

# Of each prompt, the number of what answers it and the place of its last token.
Decide = Callable[[Sequence[Sequence[int]]], Sequence[tuple[int, int]]]
# The place of a token that has not come.
_NEVER = torch.iinfo(torch.int64).max
# Tokens of windows that are decided at once, padding too: an engine leaves little of a GPU's memory to others.
_AT_ONCE = 2**14


@dataclass(frozen=True)
class StepRoute:
    """What is routed of a step: the indices of its tokens, by which memory, and which tokens they are, all (n,)."""

    token: Tensor
    memory: Tensor
    tokens: AnswerTokens


@dataclass
class _Answered:
    """A request that is answered: by what, from where on, and the row that says where its answer ended."""

    memory: int
    end: int
    row: int


class Requests:
    """The decisions on requests that are running or waiting to continue.

    Args:
        decide: which memory answers prompts.
        marks: how chats mark turns; a special token ends an answer.
        whole: whether a memory answers its prompt's tokens, too.
        pairs: what edits need to answer one after the other, if they do.
    """

    def __init__(
        self, decide: Decide, marks: TurnMarks, *, whole: bool = False, pairs: AnswerPairs | None = None
    ) -> None:
        self._decide, self._marks, self._whole, self._pairs = decide, marks, whole, pairs
        self._known: dict[str, tuple[int, int]] = {}
        self._answered: dict[str, _Answered] = {}
        self._free: list[int] = []
        # Of each request that is answered, the places of the first special token and the first separator after it.
        self._ended, self._separated = torch.empty(2, 0, dtype=torch.int64)

    def admit(self, prompts: Mapping[str, Sequence[int]]) -> None:
        """Decide new requests, together; several with the same prompt are decided once."""
        different = list(dict.fromkeys(tuple(prompt) for prompt in prompts.values()))
        decided = dict(zip(different, self._decide(different), strict=True)) if different else {}
        for request, prompt in prompts.items():
            memory, end = decided[tuple(prompt)]
            self._known[request] = (memory, end)
            if memory != UNROUTED:
                self._answered[request] = _Answered(memory, end, self._free.pop() if self._free else self._added())

    def _added(self) -> int:
        self._ended, self._separated = (torch.cat([place, place.new_full((1,), _NEVER)]) for place in self._places)
        return len(self._ended) - 1

    @property
    def _places(self) -> tuple[Tensor, Tensor]:
        return self._ended, self._separated

    def forget(self, requests: Iterable[str]) -> None:
        """Forget finished requests."""
        for request in requests:
            self._known.pop(request, None)
            if (answered := self._answered.pop(request, None)) is not None:
                for places in self._places:
                    places[answered.row] = _NEVER
                self._free.append(answered.row)

    def decided(self, request: str) -> int | None:
        """Return the memory that answers a request, ``UNROUTED`` for none; ``None`` of a request that is not known."""
        known = self._known.get(request)
        return None if known is None else known[0]

    @property
    def answers_any(self) -> bool:
        """Whether a memory answers any request that is not forgotten."""
        return bool(self._answered)

    def step(self, requests: Sequence[str], counts: Sequence[int], ids: Tensor, positions: Tensor) -> StepRoute | None:
        """Return the route of a step's tokens; ``None`` if none is routed.

        Args:
            requests: those of the step, in the order of their tokens.
            counts: how many tokens each has.
            ids: the step's tokens (T,), or more.
            positions: their places in their requests (T,), or more.
        """
        if not any(request in self._answered for request in requests):
            return None
        parts, first = [], 0
        for request, count in zip(requests, counts, strict=True):
            if (own := self._answered.get(request)) is not None:
                token = torch.arange(first, first + count)
                constants = torch.tensor([[own.row], [own.memory], [own.end]]).expand(3, count)
                parts.append(torch.cat([token[None], constants]))
            first += count
        token, row, memory, end = torch.cat(parts, 1).to(ids.device)
        return self._routed(token, row, memory, end, ids[token], positions[token].long())

    def _routed(
        self, token: Tensor, row: Tensor, memory: Tensor, end: Tensor, ids: Tensor, position: Tensor
    ) -> StepRoute:
        """Return the memory at each token of a step, and keep where the requests' answers end."""
        inside = position > end
        special = is_any(ids, self._marks.special_token_ids) & inside
        self._ended = _first_places(self._ended.to(ids.device), row, position, special)
        answers = (position >= end) & (position < self._ended[row])
        if self._pairs is not None:
            here = (ids == self._pairs.separator_token_id) & inside
            self._separated = _first_places(self._separated.to(ids.device), row, position, here)
            first = self._separated[row]
            memory = self._pairs.in_turn(memory, (position >= first).long(), position == first)
        if self._whole:
            answers = answers | (position < end)
        return StepRoute(token, memory.where(answers, UNROUTED), AnswerTokens(ids, position - end))


def _first_places(known: Tensor, row: Tensor, position: Tensor, marked: Tensor) -> Tensor:
    """Return where each request has its first marked token (R,), from what was known and the tokens of a step (n,)."""
    # What a step runs again, after preemption or a wrong guess, it says again.
    begins = torch.full_like(known, _NEVER).scatter_reduce_(0, row, position, "amin")
    before = known.where(known < begins, _NEVER)
    return before.scatter_reduce(0, row, position.where(marked, _NEVER), "amin")


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return prompts' token ids padded on the right (B, T), and which of them are no padding (B, T)."""
    rows = [torch.tensor(list(prompt), dtype=torch.long) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def batches(lengths: Tensor) -> Iterator[Tensor]:
    """Yield rows of these lengths (B,) by their numbers, those of a length together: as many at once as are no more
    than ``_AT_ONCE`` tokens, padded to the longest of them, or one.
    """
    order = lengths.argsort(stable=True)  # the same in every process
    first = 0
    for place, length in enumerate(lengths[order].tolist()):
        if place > first and (place + 1 - first) * length > _AT_ONCE:
            yield order[first:place]
            first = place
    if len(order):
        yield order[first:]
