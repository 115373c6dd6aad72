"""Generation with edits: which memory answers a prompt is decided before its first token is generated.

Needs torch and transformers only; exports carry this very file.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from wisecli.routing.deciding.decision import AnswerTokens
from wisecli.routing.deciding.prompt_window import UNROUTED, Answering, Tokens
from wisecli.routing.layers.module_types import ANSWERING, SignatureMixin
from wisecli.routing.passes.routed_pass import Override, RoutedDecoder, given_answering, is_off, overridden_by
from wisecli.routing.passes.token_cache import cache_given, length_of, rewind, tokens_in

# Of the `generate()` that is running: whose it is, and what its prompts decided.
_DECIDED: ContextVar[tuple[Any, Tensor] | None] = ContextVar("wise_decided", default=None)

# The numbers of pairs of more edits do not fit into 32 bits, which continuous batching keeps of a number.
_MOST_IN_PAIRS = 46_000


class RoutedCausal(SignatureMixin):
    """Added to a language model whose decoder is routed: it decides prompts before ``generate()`` answers them.

    ``generate()`` is given whole prompts, and says so to every pass: however those are cut, cached or run, the answer
    is that of the prompt.

    ``wise_decoder`` is the path of the decoder, ``None`` for the module below the head.
    """

    wise_decoder: str | None = None

    def get_parameter(self, target: str) -> Any:
        """Return a parameter, or a tensor of the memory: quantisers ask for the type of each."""
        try:
            return super().get_parameter(target)
        except AttributeError:
            return self.get_buffer(target)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; within ``generate()`` its prompts are decided already."""
        given = kwargs.pop(ANSWERING, None)
        if given is None:
            return super().forward(*args, **kwargs)
        with given_answering(Answering.unpacked(given)):
            return super().forward(*args, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does; ``wise_answering`` is the result of :meth:`decided`, if it is known.

        Raises:
            ValueError: prompts are given as embeddings, in the place of tokens.
        """
        given = kwargs.pop(ANSWERING, None)
        running, config = _DECIDED.get(), kwargs.get("generation_config")
        decoder = decoder_of(self)
        own_draft = running is not None and running[0] is self and getattr(config, "is_assistant", False)
        if own_draft or decoder is None or is_off():
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is None and kwargs.get("inputs_embeds") is not None:
            raise ValueError("this model's edits open by what the tokens of a prompt say: give it input_ids")
        if given is None and ids is not None:
            given = _decided(self, decoder, ids, kwargs)
        token = _DECIDED.set(None if given is None else (self, given))
        try:
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            _DECIDED.reset(token)

    @torch.no_grad()
    def decided(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Return the memory that answers each prompt and where the prompt ends, (B, 2), as ``generate()`` takes it.

        ``None`` while the main memory alone answers.

        Args:
            ids, mask: token ids and attention mask of whole prompts, (B, T).
        """
        decoder = decoder_of(self)
        if decoder is None or is_off():
            return None
        return _decided(self, decoder, ids, {"attention_mask": mask})

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Prepare inputs as the model does, with the decision on each row."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        running = _DECIDED.get()
        if running is not None and running[0] is self:
            packed = running[1].to(input_ids.device)
            # Beams and several answers to a prompt are rows of their own, side by side.
            inputs[ANSWERING] = packed.repeat_interleave(len(input_ids) // len(packed), 0)
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Begin continuous batching as the model does; each request's prompt is decided when it comes in.

        Raises:
            RuntimeError: this version of transformers has no way to tell a pass of its requests.
        """
        manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        decoder = decoder_of(self)
        if decoder is None or isinstance(getattr(manager, "logit_processor", None), RequestAnswers):
            return manager
        if not hasattr(getattr(manager, "logit_processor", None), "prepare_tensor_args"):
            raise RuntimeError(
                "continuous batching of an edited model needs transformers 5.20 or newer; use generate() instead"
            )
        manager.logit_processor = RequestAnswers(manager.logit_processor, decoder)
        return manager


def decoder_of(model: Any) -> RoutedDecoder | None:
    """Return the part of a model that decides its prompts, or ``None`` if it has none."""
    path = getattr(model, "wise_decoder", None)
    decoder = getattr(model, model.base_model_prefix, model) if path is None else model.get_submodule(path)
    return decoder if isinstance(decoder, RoutedDecoder) else None


def _decided(model: Any, decoder: RoutedDecoder, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Decide whole prompts: token ids (B, T), or those that follow a cache → memory and end of each (B, 2)."""
    ids = ids.to(model.device)
    _make_plain(model, ids)
    mask, cache = kwargs.get("attention_mask"), cache_given(kwargs)
    if mask is None or mask.dim() != 2:
        mask = torch.ones_like(ids) if (pad := _padding(model, kwargs)) is None else ids != pad
    if mask.shape[1] > ids.shape[1]:
        earlier, _ = tokens_in(cache, len(ids), ids.device)
        ids = torch.cat([earlier, ids], 1)
        mask = mask[:, -ids.shape[1] :]
    non_padding = mask.to(ids.device).bool() & (ids >= 0)
    end = decoder.wise_marks.ends_in(ids, non_padding)
    answering = Answering(decoder.memory.numbers(decoder.decide(ids, non_padding, end)), end)
    length = length_of(cache)
    if 0 < length < ids.shape[1] and isinstance(cache, Cache):
        here = Tokens(ids[:, :length], non_padding[:, :length], ids[:, :0], answering.memory)
        rewind(cache, decoder.routed(here, answering).memory.where(here.non_padding, UNROUTED))
    return answering.packed()


@torch.no_grad()
def _make_plain(model: Any, ids: Tensor) -> None:
    """Run one token through a quantised model whose weights become plain numbers before its first pass: a decision runs
    a part of the model, for which nothing would make them so.
    """
    if getattr(model, "hf_quantizer", None) is not None and model._forward_pre_hooks:
        with overridden_by(Override(off=True)):
            model(input_ids=torch.zeros_like(ids[:1, :1]), use_cache=False)


def _padding(model: Any, kwargs: dict[str, Any]) -> int | None:
    """Return the token that ``generate()`` takes for padding where no mask is given: the one that ends no text."""
    config = kwargs.get("generation_config") or model.generation_config
    pad, ends = (kwargs.get(name, getattr(config, name, None)) for name in ("pad_token_id", "eos_token_id"))
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    return None if pad is None or pad in ends else int(pad)


class RequestAnswers:
    """Tells every pass of continuous batching which memory answers each request, and where its prompt ends.

    It stands in the place of the processors of logits, whose arguments a pass is given request by request, and puts two
    rows of numbers behind theirs.

    Args:
        inner: the processors.
    """

    def __init__(self, inner: Any, decoder: RoutedDecoder) -> None:
        self.inner, self.decoder = inner, decoder
        self.tensors_required = inner.tensors_required + 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def fill_defaults(self, numbers: Tensor) -> None:
        """Fill the rows that no request has written."""
        self.inner.fill_defaults(numbers[:-2])
        numbers[-2:] = UNROUTED

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Tensor:
        """Write the decisions on a pass' requests; all that are new are decided together."""
        self.inner.prepare_tensor_args(requests_in_batch, arg_storage[:-2])
        states = [request.state for request in requests_in_batch]
        new = [state for state in states if not hasattr(state, "wise_answering")]
        if new:
            for state, own in zip(new, self._decided([_prompt_of(state) for state in new]), strict=True):
                state.wise_answering = own
        numbers = torch.tensor([self._answering(state) for state in states]).to(arg_storage.dtype)
        arg_storage[-2:, : len(states)] = numbers.T.to(arg_storage.device)
        return arg_storage

    def __call__(self, ids: Tensor, scores: Tensor, numbers: Tensor) -> Tensor:
        """Return the logits unchanged."""
        processed: Tensor = self.inner(ids, scores, numbers[:-2])
        return processed

    def _answering(self, state: Any) -> tuple[int, int]:
        """Return the number of the edit or pair that answers a request, until a special token, and the prompt's end."""
        memory, end = state.wise_answering
        answer = [*state.initial_tokens[len(_prompt_of(state)) :], *state.generated_tokens]
        if memory != UNROUTED and not set(answer).isdisjoint(self.decoder.wise_marks.special_token_ids):
            memory = UNROUTED
            state.wise_answering = memory, end
        if answer and memory >= len(self.decoder.memory.thresholds):  # a pair
            ids = torch.tensor([answer], device=self._device)
            tokens = AnswerTokens(ids, torch.arange(1, len(answer) + 1, device=self._device)[None])
            numbers = self.decoder.memory.in_turn(torch.full_like(ids, memory), tokens)
            memory = int(numbers[0, -1])
        return memory, end

    @property
    def _device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @torch.no_grad()
    def _decided(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Return the memory that answers each prompt, and the index of its last token."""
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        non_padding = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            non_padding[row, : len(prompt)] = True
        ids, non_padding = ids.to(self._device), non_padding.to(self._device)
        end = self.decoder.wise_marks.ends_in(ids, non_padding)
        decision, memory = self.decoder.decide(ids, non_padding, end), self.decoder.memory
        numbers = decision.memory if len(memory.thresholds) > _MOST_IN_PAIRS else memory.numbers(decision)
        return list(zip(numbers.tolist(), end.tolist(), strict=True))


def _prompt_of(state: Any) -> list[int]:
    """Return a request's prompt, without the tokens that were generated before it was preempted."""
    own = getattr(state, "_true_initial_tokens", 0)
    return list(state.initial_tokens[:own] if own else state.initial_tokens)
