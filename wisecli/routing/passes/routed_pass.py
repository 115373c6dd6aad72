"""How a model's passes are routed: the decoder decides at the beginning of a pass which memory answers each token.

Needs torch and transformers only; exports carry this very file.

    decoder        looks at the pass' tokens; where a prompt ends in it, runs the prompt's window through the layers up
                   to those that are read, by itself, and decides
    edited layer   hands what was decided to the routed matrix within it, also when gradient checkpointing runs it anew

What belongs to one call is an argument of that call or, within it, a variable of its context: each thread has its own.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from wisecli.routing.deciding.decision import AnswerTokens, Decision
from wisecli.routing.deciding.prompt_window import (
    NO_TOKEN,
    UNROUTED,
    Answering,
    Tokens,
    TurnMarks,
    is_any,
    window_size,
    windows,
)
from wisecli.routing.layers.layer_states import state_of
from wisecli.routing.layers.module_types import ModuleMixin, SignatureMixin, accepted_arguments
from wisecli.routing.memories.side_memory import Memory
from wisecli.routing.passes.forward_arguments import eager_only, named_arguments
from wisecli.routing.passes.token_cache import (
    cache_given,
    cache_returned,
    keep_tokens,
    last_memory,
    last_tokens,
    length_of,
    tokens_in,
)
from wisecli.routing.passes.window_reading import DecidedError, WindowReading

# What configs call the tokens that stand for what is no text.
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")


@dataclass(frozen=True)
class PassRoute:
    """The memory that answers each token of a pass (B, T), and which tokens those are (B, T)."""

    memory: Tensor
    tokens: AnswerTokens

    def at(self, states: Tensor) -> tuple[Tensor, AnswerTokens]:
        """Return both for the states of a layer (B, t, d), which may be those of the last tokens alone."""
        last = slice(self.memory.shape[1] - states.shape[1], None)
        ids, place = (part[:, last].to(states.device) for part in (self.tokens.ids, self.tokens.place))
        return self.memory[:, last].to(states.device), AnswerTokens(ids, place)


@dataclass(frozen=True)
class Override:
    """Replaces routing for a while: the main memory alone answers (``off``), or one memory does (``forced``)."""

    off: bool = False
    forced: int | None = None


_NO_OVERRIDE = Override()
# Of the call that is running: what its tokens are answered by, what replaces that, the windows that are being read, and
# what `generate()` decided.
_ROUTE: ContextVar[PassRoute | None] = ContextVar("wise_route", default=None)
_OVERRIDE: ContextVar[Override] = ContextVar("wise_override", default=_NO_OVERRIDE)
_READING: ContextVar[WindowReading | None] = ContextVar("wise_reading", default=None)
_GIVEN: ContextVar[Answering | None] = ContextVar("wise_given", default=None)


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def overridden_by(override: Override) -> AbstractContextManager[None]:
    """Return a context, of this thread alone, in which an override takes the place of the router."""
    return _set(_OVERRIDE, override)


def given_answering(answering: Answering | None) -> AbstractContextManager[None]:
    """Return a context for passes whose prompts were decided already."""
    return _set(_GIVEN, answering)


def in_pass(route: PassRoute | None) -> AbstractContextManager[None]:
    """Return a context in which the edited layer runs with this route."""
    return _set(_ROUTE, route)


def current_route() -> PassRoute | None:
    """Return the route of the running pass, if there is one."""
    return _ROUTE.get()


def is_off() -> bool:
    """Return whether the main memory alone answers for now."""
    return _OVERRIDE.get().off


def read_here(states: Tensor) -> None:
    """If windows are being read, hand these states of theirs over, and end the run if they are enough to decide."""
    reading = _READING.get()
    decision = None if reading is None else reading.take(states)
    if decision is not None:
        raise DecidedError(decision)


class RoutedDecoder(SignatureMixin):
    """Added to a decoder with an edited layer: it decides which memory answers each prompt of a pass.

    ``wise_routed`` is the path of the routed matrix in it; ``wise_marks`` says how chats mark turns.
    """

    config: Any
    wise_routed: str
    wise_marks: TurnMarks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder, with the tokens of a pass routed.

        Raises:
            ValueError: the model was given embeddings in the place of tokens.
        """
        if _READING.get() is not None or is_off():
            return super().forward(*args, **kwargs)
        kwargs = named_arguments(type(self), args, kwargs)
        ids = kwargs.get("input_ids")
        if ids is None:
            raise ValueError("this model's edits open by what the tokens of a prompt say: give it input_ids")
        return self._routed(ids, kwargs)

    def _routed(self, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """Run the model with the route of this pass, and keep its tokens and the decision with the cache."""
        mask, cache = kwargs.get("attention_mask"), cache_given(kwargs)
        if "read_index" in kwargs:  # requests packed into one row, whose prompts were decided as they came in
            with in_pass(packed_route(ids, kwargs)):
                return super().forward(**kwargs)
        earlier = length_of(cache)
        route = self.route(ids, mask, cache, _GIVEN.get())
        with in_pass(route):
            output = super().forward(**kwargs)
        cache = cache_returned(output) if cache is None else cache
        if cache is not None:
            keep_tokens(cache, earlier, ids.where(_non_padding(ids, mask), NO_TOKEN), route.memory)
        return output

    @eager_only
    def route(self, ids: Tensor, mask: Tensor | None, cache: Any, given: Answering | None) -> PassRoute:
        """Return the route of a pass (B, T) that continues from a cache."""
        start, non_padding = length_of(cache), _non_padding(ids, mask)
        forced = _OVERRIDE.get().forced
        if given is None:
            earlier, memories = tokens_in(cache, len(ids), ids.device)
            before = memories[:, -1] if start else memories.new_full((len(ids),), UNROUTED)
            tokens = Tokens(ids, non_padding, earlier, before)
            end = tokens.prompt_ends(self.wise_marks)
            memory = self._decided(tokens, end, forced)
            answering = Answering(memory, end.where(end >= 0, -_answered_last(memories)))
        else:
            memory = given.memory if forced is None else torch.full_like(given.memory, forced)
            held, tail = last_memory(cache), last_tokens(cache, len(self.wise_marks.opener_token_ids))
            before = memory if held is None else held.to(memory)
            tokens = Tokens(ids, non_padding, ids[:, :0] if tail is None else tail, before)
            answering = Answering(memory, given.end - start)
        route = self.routed(tokens, answering)
        return replace(route, memory=route.memory.where(non_padding, UNROUTED))

    def routed(self, tokens: Tokens, answering: Answering) -> PassRoute:
        """Return the route of a pass (B, T) whose prompts are decided."""
        numbers = tokens.answered_by(self.wise_marks, answering, whole=self.memory.answers_prompts)
        placed = AnswerTokens(tokens.ids, tokens.places(answering))
        return PassRoute(self.memory.in_turn(numbers, placed), placed)

    @property
    def memory(self) -> Memory:
        """The routed matrix."""
        return cast(Memory, self.get_submodule(self.wise_routed))

    def _decided(self, tokens: Tokens, end: Tensor, forced: int | None) -> Tensor:
        """Return the number of the memory that answers each prompt that ends in a pass (B,)."""
        if forced is not None:
            return torch.full_like(end, forced)
        memory = torch.full_like(end, UNROUTED)
        rows = (end >= 0).nonzero().flatten()
        if len(rows):
            whole = tokens.whole[rows]
            decision = self.decide(whole, whole >= 0, end[rows] + tokens.earlier.shape[1])
            memory[rows] = self.memory.numbers(decision)
        return memory

    @eager_only
    def decide(self, ids: Tensor, non_padding: Tensor, end: Tensor) -> Decision:
        """Decide which memory answers prompts, from their windows alone.

        Args:
            ids: tokens of prompts and of what follows them (B, T).
            non_padding: which of them are known and no padding (B, T).
            end: the column of each prompt's last token (B,).
        """
        non_padding = non_padding & ~is_any(ids, placeholders_of(self.config))
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            return self._read(*windows(ids, non_padding, end, window_size(self.config)))

    def _read(self, ids: Tensor, non_padding: Tensor) -> Decision:
        """Run windows by themselves, as far as needed, and return what is decided.

        Args:
            ids: windows (B, W), padded on the right.
            non_padding: which of their tokens are no padding (B, W).
        """
        position = (non_padding.long().cumsum(1) - 1).clamp(min=0)
        try:
            with _set(_READING, WindowReading(self.memory, ids, non_padding)):
                named = {
                    "input_ids": ids,
                    "attention_mask": non_padding.long(),
                    "position_ids": position,
                    "use_cache": False,
                }
                super().forward(**accepted_arguments(type(self), named))
        except DecidedError as found:
            return found.decision
        raise RuntimeError("the edits are lost: no layer of this model stops where its states are read")


def placeholders_of(config: Any) -> tuple[int, ...]:
    """Return a model's placeholder tokens for images, video and audio, which say nothing of their content."""
    found = (getattr(config, name, None) for name in _PLACEHOLDERS)
    return tuple(token for token in found if isinstance(token, int))


def _non_padding(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return which tokens of a pass (B, T) are no padding, by the attention mask of all tokens so far."""
    if mask is None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask[:, -ids.shape[1] :].bool()


def _answered_last(memories: Tensor) -> Tensor:
    """Return how many of the last tokens of each row (B, P) a memory answered, and at least 1: (B,)."""
    return (memories != UNROUTED).flip(1).long().cumprod(1).sum(1).clamp(min=1)


def packed_route(ids: Tensor, kwargs: dict[str, Any]) -> PassRoute:
    """Return the route of requests that are packed into one row (1, T).

    Args:
        ids: the tokens of the row (1, T).
        kwargs: of a pass of continuous batching; the last two rows of ``logits_processor_args`` say which memory
            answers each request, and at which of its tokens its prompt ends.
    """
    position, begins = kwargs["position_ids"], kwargs["cu_seq_lens_q"].long()
    column = torch.arange(position.shape[1], device=position.device)
    request = (torch.searchsorted(begins, column, right=True) - 1).clamp(min=0)
    args = kwargs["logits_processor_args"]
    request = request.clamp(max=args.shape[1] - 1)
    memory, end = args[-2].long()[request][None], args[-1].long()[request][None]
    return PassRoute(memory.where(position >= end, UNROUTED), AnswerTokens(ids, position - end))


class EditedLayer(ModuleMixin):
    """A decoder layer with the routed matrix in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with the route among its arguments, which gradient checkpointing gives it again."""
        kwargs.setdefault("wise_route", _ROUTE.get())
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with the route of its tokens."""
        with in_pass(kwargs.pop("wise_route", None)):
            return super().forward(*args, **kwargs)


class ReadLayer(ModuleMixin):
    """A decoder layer whose states are read; ``wise_streams`` as in :mod:`~wisecli.routing.layers.layer_states`."""

    wise_streams: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; the run of a window may end here."""
        output = super().forward(*args, **kwargs)
        read_here(state_of(output, self.wise_streams))
        return output
