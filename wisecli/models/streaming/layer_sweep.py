"""The layer-outer loop: each streamed layer is read once and runs on many batches before the next one is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from wisecli.models.layout.site_interface import Site
from wisecli.models.running.hooks import hooked, overridden
from wisecli.models.streaming.tensor_spill import Spool

if TYPE_CHECKING:
    from wisecli.models.streaming.layer_stream import LayerStream


def sweep(
    stream: LayerStream,
    passes: Sequence[Callable[[], object]],
    upto: int,
    spool: Spool,
    after: Callable[[int], None],
    *,
    lower: int | None = None,
) -> None:
    """Run many batches through the layers up to ``upto``, each of which is read once.

    What leaves that layer is left in the spool as ``hidden.0``, ``hidden.1`` …

    Args:
        passes: for each batch the model's own forward pass over it.
        after: called after every run of layer ``upto``, with the number of the batch.
        lower: a layer below, of which the same is left as ``lower.0``, ``lower.1`` …
    """
    calls = [_recorded(stream, run, spool, number) for number, run in enumerate(passes)]
    for layer in range(upto + 1):
        with stream.filled(layer, layer + 1 if layer < upto else None):
            for number, call in enumerate(calls):
                if layer not in call:
                    continue
                args, named = call[layer]
                given = [_renewed(arg) for arg in args], {name: _renewed(value) for name, value in named.items()}
                output = stream.layers[layer](spool.take(f"hidden.{number}"), *given[0], **given[1])
                states = output[0] if isinstance(output, (tuple, list)) else output
                spool.put(f"hidden.{number}", states)
                if layer == lower:
                    spool.put(f"lower.{number}", states)
                if layer == upto:
                    after(number)
    stream.release()


def sweep_to_site(
    model: nn.Module,
    stream: LayerStream,
    passes: Sequence[Callable[[], object]],
    site: Site,
    spool: Spool,
    starts: Sequence[int],
    lower: str | None = None,
) -> nn.Module | None:
    """Run many batches up to a site's layer, and return a copy of the norm behind its matrix, if there is one.

    Beside hidden states what :func:`left_by_sweep` names is left in the spool.

    Args:
        starts: the column of each batch from which on keys and what the matrix gives are left.
        lower: the path of a layer below.
    """
    kept: dict[str, Any] = {}

    def keep(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept.update(keys=site.keys(inputs, output), output=output)
        if site.norm is not None and "norm" not in kept:
            # The layer is empty once the sweep has passed it.
            kept["norm"] = copy.deepcopy(model.get_submodule(site.norm))

    def put(number: int) -> None:
        for name in {"keys", "output"}.intersection(left_by_sweep(site, lower)):
            spool.put(f"{name}.{number}", kept.pop(name)[:, starts[number] :])

    below = None if lower is None else int(lower.rpartition(".")[2])
    with hooked(site.watched(model).register_forward_hook(keep)):
        sweep(stream, passes, site.layer, spool, put, lower=below)
    return kept.get("norm")


def left_by_sweep(site: Site, lower: str | None) -> list[str]:
    """Return what a sweep to a site leaves of each batch beside hidden states: keys, or instead of them what left a
    lower layer; and what the matrix gives, where that passes a norm.
    """
    return ["keys" if lower is None else "lower", *(["output"] if site.norm is not None else [])]


def _renewed(given: Any) -> Any:
    """Return what a layer is given, a cache that only this layer has seen instead of one for all."""
    return copy.deepcopy(given) if isinstance(given, Cache) else given


def _recorded(
    stream: LayerStream, run: Callable[[], object], spool: Spool, number: int
) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return what a pass gives each layer beside the hidden states: the architecture's own masks and positions."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def stub(layer: int, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        if not calls:
            spool.put(f"hidden.{number}", hidden_states)
        calls[layer] = args, named
        return (hidden_states, *[None] * (stream.width - 1)) if stream.width else hidden_states

    with ExitStack() as stubs:
        for layer, module in enumerate(stream.layers):
            stubs.enter_context(overridden([module], partial(stub, layer)))
        run()
    return calls
