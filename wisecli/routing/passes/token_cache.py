"""The tokens in an attention cache, and the memory that answered each, kept as one more layer of the cache.

Needs torch and transformers only; exports carry this very file.

A decision is a function of token ids, and a pass that goes on with a cache is given the new ones only. So the ids lie
in the cache, as the keys and values do that are functions of them, too: whatever crops, copies, reorders, repeats or
empties a cache does the same to them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from wisecli.routing.deciding.prompt_window import NO_TOKEN, UNROUTED


class GrowingTokens(DynamicLayer):
    """Token ids (B, 1, P, 1) in the place of keys, and the memories that answered them in that of values."""

    is_compileable = True


class StaticTokens(StaticLayer):
    """The same in a cache of a fixed size."""


def cache_given(named: dict[str, Any]) -> Any:
    """Return the attention cache among the arguments of a pass, or ``None``.

    ``transformers`` calls it ``cache`` from 5.24 on, and ``past_key_values`` before.
    """
    return named.get("cache", named.get("past_key_values"))


def cache_returned(output: Any) -> Any:
    """Return the attention cache in what a model or its ``generate()`` returns, or ``None``. Both names, as above."""
    return output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)


def length_of(cache: Any) -> int:
    """Return how many tokens a cache holds."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # one of recurrent states alone, which do not say; behind a pass the tokens themselves do
        return 0


def tokens_in(cache: Any, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a cache's tokens, ``NO_TOKEN`` where they are unknown, and the memory that answered each: (B, P) twice."""
    length, layer = length_of(cache), _layer_of(cache)
    known = 0 if layer is None else min(int(layer.get_seq_length()), length)
    known = known if known and len(layer.keys) == rows else 0
    # What another model has put behind them is not known.
    ids = torch.full((rows, length), NO_TOKEN, dtype=torch.long, device=device)
    memories = torch.full_like(ids, UNROUTED)
    if known:
        ids[:, :known] = layer.keys[:, 0, :known, 0].to(device)
        memories[:, :known] = layer.values[:, 0, :known, 0].to(device)
    return ids, memories


def last_memory(cache: Any) -> Tensor | None:
    """Return the memory that answered the last token of each row of a cache (B,), or ``None`` if that is unknown."""
    length, layer = length_of(cache), _layer_of(cache)
    if layer is None or not length or int(layer.get_seq_length()) != length:
        return None
    return layer.values[:, 0, length - 1, 0]  # type: ignore[no-any-return]


def last_tokens(cache: Any, count: int) -> Tensor | None:
    """Return the last ``count`` tokens of a cache (B, count), fewer if it is shorter, ``None`` if they are unknown."""
    length, layer = length_of(cache), _layer_of(cache)
    if layer is None or not length or int(layer.get_seq_length()) != length:
        return None
    return layer.keys[:, 0, max(0, length - count) : length, 0]  # type: ignore[no-any-return]


def rewind(cache: Any, memories: Tensor) -> None:
    """Crop a cache before the first token that another memory should have answered.

    Their keys and values above the edited layer are not those of a prompt that is read as a whole.

    Args:
        memories: what ought to have answered each of the cache's tokens (B, P).
    """
    _, found = tokens_in(cache, len(memories), memories.device)
    wrong = (found != memories).any(0).nonzero().flatten()
    if not len(wrong):
        return
    # What slid out of it, or went into a recurrent state, does not come back.
    if any(getattr(layer, "is_sliding", False) or hasattr(layer, "conv_states") for layer in cache.layers):
        cache.reset()
    else:
        cache.crop(int(wrong[0]) - length_of(cache))


def keep_tokens(cache: Any, earlier: int, ids: Tensor, memories: Tensor) -> None:
    """Add a pass' tokens and the memories that answer them, (B, T) twice, to the cache of its keys and values.

    What holds its layers in another way than transformers' caches do keeps none.

    Args:
        earlier: how many tokens the cache held before the pass.
    """
    if not isinstance(cache, Cache) or not cache.layers:
        return
    layer = _layer_of(cache)
    if layer is None:
        static = any(isinstance(layer_cache, StaticLayer) for layer_cache in cache.layers)
        layer = StaticTokens(max_cache_len=cache.get_max_length()) if static else GrowingTokens()  # type: ignore[no-untyped-call]
        # Beside recurrent states alone a compileable layer would have masks made as for attention.
        layer.is_compileable = not all(hasattr(layer_cache, "conv_states") for layer_cache in cache.layers)
        cache.layers.append(layer)
    known = int(layer.get_seq_length())
    if known > earlier:  # it was emptied by hand, or belongs to other tokens
        layer.crop(earlier - known)
    elif known < earlier:
        gap = ids.new_full((len(ids), earlier - known), NO_TOKEN)
        _put(layer, gap, torch.full_like(gap, UNROUTED))
    _put(layer, ids, memories)


def _put(layer: Any, ids: Tensor, memories: Tensor) -> None:
    layer.update(ids[:, None, :, None], memories[:, None, :, None])


def _layer_of(cache: Any) -> Any:
    layers = getattr(cache, "layers", None)
    last = layers[-1] if layers else None
    return last if isinstance(last, (GrowingTokens, StaticTokens)) else None
