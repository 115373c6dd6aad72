"""Run windows of prompts through the first layers of a vLLM model, by themselves, for a decision.

The layers are the model's own, whatever their weights are stored in. Only attention is computed here, as vLLM's wants a
cache and the tokens of running requests: every window is a prompt of its own, without a past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention

from wisecli.routing.deciding.decision import Decision
from wisecli.routing.passes.window_reading import DecidedError
from wisecli.vllm_plugin.engine_names import LAYER
from wisecli.vllm_plugin.served_memory import Keys, Take

# Numbers of attention that may lie in memory at once, as an engine leaves little of a GPU's to others.
_LOGITS = 2**26


class _KeyReader:
    """Stands in for the memory while windows are read: where its keys are wanted, it hands these over.

    Args:
        take: is given the keys (T, width); ``None`` if they are not wanted.
    """

    def __init__(self, *, cut: bool, take: Callable[[Tensor], None] | None) -> None:
        self.cut, self.adds_rest, self._take = cut, False, take

    def add_to(self, answer: Tensor, keys: Keys, **_real: bool) -> None:
        if self._take is not None:
            self._take(keys(torch.arange(len(answer), device=answer.device))[0])


class WindowAttention:
    """Stands in for a layer's attention: tokens of windows attend to those before them in the same window.

    Args:
        layer: vLLM's.
        lengths: of the windows, which lie one after the other.
    """

    def __init__(self, layer: Attention, lengths: Sequence[int]) -> None:
        self.impl, self.kv_cache = self, None
        self._lengths = list(lengths)
        inner = layer.impl
        self._scale, self._window = float(inner.scale), layer.sliding_window
        self._cap = float(getattr(inner, "logits_soft_cap", None) or 0.0)
        self._sinks, self._slopes = getattr(inner, "sinks", None), getattr(inner, "alibi_slopes", None)

    def forward(
        self, _layer: Any, query: Tensor, key: Tensor, value: Tensor, *_args: Any, output: Tensor, **_kwargs: Any
    ) -> Tensor:
        """Write what the tokens attend to into ``output``, which has the shape of ``query`` (T, heads, width)."""
        parts = [self._padded(tensor) for tensor in (query, key, value)]
        rows = max(1, _LOGITS // (parts[0].shape[1] * parts[0].shape[2] ** 2))
        some = (self._attend(*own) for own in zip(*(part.split(rows) for part in parts), strict=True))
        attended = torch.cat(list(some)).transpose(1, 2)
        mine = torch.cat([row[:length] for row, length in zip(attended, self._lengths, strict=True)])
        output.copy_(mine.reshape(output.shape))
        return output

    def _padded(self, packed: Tensor) -> Tensor:
        rows = packed.split(self._lengths)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)  # (B, heads, W, width)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return causal attention of padded rows, with the soft cap, sinks, slopes or window of the model's layer."""
        plain = not self._cap and self._sinks is None and self._slopes is None
        width = query.shape[2]
        if plain and (self._window is None or self._window >= width):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self._scale, enable_gqa=True)
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        logits = (query.float() @ key.float().transpose(2, 3)) * self._scale
        logits = torch.tanh(logits / self._cap) * self._cap if self._cap else logits
        return self._weights(logits).to(value.dtype) @ value

    def _weights(self, logits: Tensor) -> Tensor:
        """Return the attention weights of logits (B, heads, T, T)."""
        width = logits.shape[-1]
        position = torch.arange(width, device=logits.device)
        away = position[:, None] - position
        if self._slopes is not None:
            logits = logits - torch.as_tensor(self._slopes, device=logits.device)[:, None, None] * away
        hidden = (away < 0) if self._window is None else (away < 0) | (away >= self._window)
        logits = logits.masked_fill(hidden, -torch.inf)
        if self._sinks is None:
            return logits.softmax(-1)
        sinks = self._sinks.float()[:, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]


@contextmanager
def whole_queries(layer: Any) -> Iterator[None]:
    """Return a context in which an attention layer leaves queries as they are, also for a cache of eight bits."""
    quantise = getattr(layer, "query_quant", None)
    if quantise is None:
        yield
        return
    layer.query_quant = None
    try:
        yield
    finally:
        layer.query_quant = quantise


class WindowReader:
    """Reads states of windows.

    Args:
        model: vLLM's causal language model.
        vllm_config: its settings.
        layers: path of the list of its decoder layers.
        read: the numbers of the layers whose output is read; none to read the keys of the edited layer.
    """

    def __init__(self, model: nn.Module, vllm_config: Any, layers: str, read: Sequence[int]) -> None:
        self._model, self._config = model, vllm_config
        self._layers, self._read = cast(nn.ModuleList, model.get_submodule(layers)), tuple(read)
        self._most = vllm_config.scheduler_config.max_num_batched_tokens
        # Called before a run with how many tokens it has: an adapter's layers must know whose those are.
        self.before_run: Callable[[int], None] | None = None
        # Layers of a model are alike: what holds of the one that is read holds of the edited one.
        self.adds_rest = True

    def parts(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Yield parts of windows that hold no more tokens than a step of vLLM's does, or one window each."""
        first, tokens = 0, 0
        for number, length in enumerate(lengths):
            if number > first and tokens + length > self._most:
                yield slice(first, number)
                first, tokens = number, 0
            tokens += length
        if len(lengths) > first:
            yield slice(first, len(lengths))

    def run(self, windows: Sequence[Tensor], take: Take) -> Decision:
        """Run windows of token ids (W,) up to the layer at which they are decided, and return the decision."""
        lengths = [len(window) for window in windows]
        positions = torch.cat([torch.arange(length) for length in lengths]).to(windows[0].device)
        ids = torch.cat(list(windows))
        if self.before_run is not None:
            self.before_run(len(ids))

        def taken(states: Tensor) -> None:
            decision = take(states.flatten(0, -2).split(lengths))
            if decision is not None:
                raise DecidedError(decision)

        context = create_forward_context({}, self._config, skip_compiled=True)
        known = dict(context.no_compile_layers)
        attention = {name: layer for name, layer in known.items() if isinstance(layer, Attention)}
        known |= {name: WindowAttention(layer, lengths) for name, layer in attention.items()}
        cut = context.no_compile_layers[LAYER].cut
        known[LAYER] = _KeyReader(cut=cut, take=None if self._read else taken)
        context.no_compile_layers = known
        context.attn_metadata = None
        with ExitStack() as held:
            held.enter_context(override_forward_context(context))
            for layer in attention.values():
                held.enter_context(whole_queries(layer))
            for number in self._read:
                self._hand_over(number, held, taken)
            try:
                self._model.forward(ids, positions, None, None)
            except DecidedError as found:
                return found.decision
        raise RuntimeError("the edits are lost: no layer of this model stops where its states are read")

    def _hand_over(self, number: int, held: ExitStack, taken: Callable[[Tensor], None]) -> None:
        """Hand over the output of a layer where it is known."""
        # Of two tensors only what reads them says whether the second is still to be added to the first.
        waiting = False

        def note(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal waiting
            if isinstance(output, Tensor):
                return taken(output)
            rest = [tensor for tensor in output[1:2] if isinstance(tensor, Tensor)]
            if not rest or number + 1 >= len(self._layers):
                return taken(sum(rest, output[0]))
            waiting = True
            return None

        def take_input(_norm: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal waiting
            if not waiting:
                return
            waiting = False
            given = [tensor for tensor in inputs[:2] if isinstance(tensor, Tensor)]
            self.adds_rest = len(given) > 1
            taken(sum(given[1:], given[0]))

        held.callback(self._layers[number].register_forward_hook(note).remove)
        if number + 1 < len(self._layers):
            for norm in self._layers[number + 1].modules():
                if "Norm" in type(norm).__name__:
                    held.callback(norm.register_forward_pre_hook(take_input).remove)
