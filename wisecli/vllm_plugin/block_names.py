"""Name blocks of an attention cache by their tokens and, from a prompt's end on, by where that is. Needs torch only."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from wisecli.routing.deciding.prompt_window import TurnMarks

Hasher = Callable[[Any], Sequence[bytes]]


def prompt_end(marks: TurnMarks, prompt: Sequence[int]) -> int:
    """Return the place of a prompt's last token."""
    ids = torch.tensor([list(prompt)])
    return int(marks.ends_in(ids, torch.ones_like(ids, dtype=torch.bool))[0])


def named_by(prompt: Sequence[int]) -> str:
    """Return a name for a whole prompt."""
    return hashlib.sha256(repr(list(prompt)).encode()).hexdigest()


class BlockNames:
    """Names a request's full blocks: as the engine does before some token, otherwise from there on.

    Args:
        plain: how the engine does; it goes on with a request's ``block_hashes``.
        size: how many tokens a block has.
        first: the first token whose keys and values depend on what answers the prompt.
        mark: what those depend on besides the tokens.
    """

    def __init__(self, plain: Hasher, size: int, first: int, mark: str) -> None:
        self._plain, self._size, self._mark = plain, size, mark.encode()
        self._first: int | None = first
        self._names: list[bytes] = []

    def take_over(self, request: Any) -> None:
        """Rename the blocks of a request that the engine has named, and all that it fills later."""
        self._names = list(request.block_hashes)
        request.block_hashes = self._marked(0)
        request._block_hasher = self

    def __call__(self, request: Any) -> list[bytes]:
        """Return names for the blocks that a request has filled since it was last asked."""
        known = request.block_hashes
        del self._names[len(known) :]
        begin = len(self._names)
        request.block_hashes = self._names
        try:
            self._names.extend(self._plain(request))
        finally:
            request.block_hashes = known
        return self._marked(begin)

    def unanswered(self) -> None:
        """Name blocks to come as the engine does: no edit answers the prompt, and none was named otherwise so far."""
        if self._first is not None and len(self._names) * self._size <= self._first:
            self._first = None

    def _marked(self, begin: int) -> list[bytes]:
        return [self._of(number, name) for number, name in enumerate(self._names[begin:], begin)]

    def _of(self, number: int, name: bytes) -> bytes:
        if self._first is None or (number + 1) * self._size <= self._first:
            return name
        return hashlib.sha256(self._mark + b"\0" + name).digest()
