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

from wisecli.vllm_plugin.engine_names import LAYER
from wisecli.vllm_plugin.served_memory import Keys

# Numbers of attention that may lie in memory at once, as an engine leaves little of a GPU's to others.
_LOGITS = 2**26


class _ReadError(Exception):
    """Ends a run at the layer that is read, with what was read there."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _KeyReader:
    """Stands in for the memory while windows are read: where its keys are wanted, the run ends at the edited layer."""

    def __init__(self, *, cut: bool, wanted: bool) -> None:
        self.keys: Tensor | None = None
        self.cut, self.adds_rest, self.wanted = cut, False, wanted

    def add_to(self, answer: Tensor, keys: Keys, **_real: bool) -> None:
        if not self.wanted:
            return
        self.keys = keys(torch.arange(len(answer), device=answer.device))[0]
        raise _ReadError(self.keys)


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
        layer: the number of the layer whose output is read; ``None`` to read the keys of the edited layer.
    """

    def __init__(self, model: nn.Module, vllm_config: Any, layers: str, layer: int | None) -> None:
        self._model, self._config = model, vllm_config
        self._layers, self._layer = cast(nn.ModuleList, model.get_submodule(layers)), layer
        self._most = vllm_config.scheduler_config.max_num_batched_tokens
        # Called before a run with how many tokens it has: an adapter's layers must know whose those are.
        self.before_run: Callable[[int], None] | None = None
        # Layers of a model are alike: what holds of the one that is read holds of the edited one.
        self.adds_rest = True

    def read(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """Return the states (W, d) of each window of token ids (W,)."""
        states: list[Tensor] = []
        for part in self._batches(windows):
            lengths = [len(window) for window in part]
            positions = torch.cat([torch.arange(length) for length in lengths]).to(part[0].device)
            states += self._run(torch.cat(list(part)), positions, lengths).split(lengths)
        return states

    def _batches(self, windows: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Yield parts of the windows that hold no more tokens than a step of vLLM's does, or one window each."""
        first, tokens = 0, 0
        for number, window in enumerate(windows):
            if number > first and tokens + len(window) > self._most:
                yield windows[first:number]
                first, tokens = number, 0
            tokens += len(window)
        if len(windows) > first:
            yield windows[first:]

    def _run(self, ids: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """Run the model on packed rows; return what the router reads, a layer's states or the site's keys."""
        if self.before_run is not None:
            self.before_run(len(ids))
        context = create_forward_context({}, self._config, skip_compiled=True)
        known = dict(context.no_compile_layers)
        attention = {name: layer for name, layer in known.items() if isinstance(layer, Attention)}
        known |= {name: WindowAttention(layer, lengths) for name, layer in attention.items()}
        cut = context.no_compile_layers[LAYER].cut
        known[LAYER] = reader = _KeyReader(cut=cut, wanted=self._layer is None)
        context.no_compile_layers = known
        context.attn_metadata = None
        with ExitStack() as held:
            held.enter_context(override_forward_context(context))
            for layer in attention.values():
                held.enter_context(whole_queries(layer))
            if self._layer is not None:
                self._stop_behind(self._layer, held)
            try:
                self._model.forward(ids, positions, None, None)
            except _ReadError as found:
                return found.states.flatten(0, -2)
        if reader.keys is not None:
            return reader.keys.flatten(0, -2)
        raise RuntimeError("the edits are lost: no layer of this model stops where its states are read")

    def _stop_behind(self, number: int, held: ExitStack) -> None:
        """End the run where the output of a layer is known."""

        def note(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                raise _ReadError(output)
            rest = [tensor for tensor in output[1:2] if isinstance(tensor, Tensor)]
            if not rest or number + 1 >= len(self._layers):
                raise _ReadError(sum(rest, output[0]))

        held.callback(self._layers[number].register_forward_hook(note).remove)
        if number + 1 < len(self._layers):
            # Of two tensors only what reads them says whether the second is still to be added to the first.
            for norm in self._layers[number + 1].modules():
                if "Norm" in type(norm).__name__:
                    held.callback(norm.register_forward_pre_hook(self._stop_with_input).remove)

    def _stop_with_input(self, _norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        given = [tensor for tensor in inputs[:2] if isinstance(tensor, Tensor)]
        self.adds_rest = len(given) > 1
        raise _ReadError(sum(given[1:], given[0]))
