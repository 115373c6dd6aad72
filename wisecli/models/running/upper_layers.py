"""The layers above an edited one run by themselves, on what is said to leave it.

The model's own forward pass runs: masks, positions, final norm and head are the architecture's own. The layers up to
the site give what is said to leave it,

    cached   for the columns that are wanted, and those above go on from attention's keys and values
    rows     for whole rows, where the layers above keep something else from token to token, or nothing
    all      and run nonetheless, where those above need more of them than the states that leave the last

Which of them a model can is found by trying (:mod:`wisecli.models.layout.site_probe`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wisecli.models.layout.architectures import ALL, CACHED, ROWS, Above
from wisecli.models.layout.site_interface import Site
from wisecli.models.running.activations import Activations, layers_of
from wisecli.models.running.forward_pass import Selection, run_model
from wisecli.models.running.hooks import giving, hooked
from wisecli.models.running.prefix_cache import empty_cache
from wisecli.routing.layers.layer_states import state_of, with_state

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

Run = Callable[["PreTrainedModel", Site, Activations, Tensor, Selection], Tensor]


def upper_logits(
    model: PreTrainedModel, site: Site, activations: Activations, hidden: Tensor, select: Selection
) -> Tensor:
    """Return logits (n, V) at the selected columns, from running the layers above the site on ``hidden``.

    Args:
        hidden: what leaves the edited layer (B, T - first, d), as ``activations.hidden`` or
            :meth:`Activations.with_update` have it; gradients flow through it.
        select: rows and columns of the batch; no column before ``activations.first``.
    """
    return _RUNS[site.above](model, site, activations, hidden, select)


def _on_from_cache(
    model: PreTrainedModel, site: Site, activations: Activations, hidden: Tensor, select: Selection
) -> Tensor:
    first = activations.first
    cache = _cache(activations, site) if first else None
    with giving(layers_of(model, site)[: site.layer + 1], hidden, activations.tuple_width):
        return run_model(model, activations.batch, select, first=first, cache=cache)


def _on_rows(model: PreTrainedModel, site: Site, activations: Activations, hidden: Tensor, select: Selection) -> Tensor:
    whole = hidden if activations.before is None else torch.cat([activations.before, hidden], 1)
    with giving(layers_of(model, site)[: site.layer + 1], whole, activations.tuple_width):
        return run_model(model, activations.batch, select)


def _with_all(
    model: PreTrainedModel, site: Site, activations: Activations, hidden: Tensor, select: Selection
) -> Tensor:
    """Return the logits of a full forward pass in which the site's layer gives ``hidden``."""

    def replaced(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        whole = torch.cat([state_of(output, site.streams)[:, : activations.first], hidden], 1)
        return with_state(output, whole, site.streams)

    with hooked(model.get_submodule(site.layer_module).register_forward_hook(replaced)):
        return run_model(model, activations.batch, select)


_RUNS: dict[Above, Run] = {CACHED: _on_from_cache, ROWS: _on_rows, ALL: _with_all}


def _cache(activations: Activations, site: Site) -> DynamicCache:
    """Return a cache that holds the prompt in the layers above the site, and only its length below."""
    cache = empty_cache()
    keys = activations.past[0][0]
    length = keys.new_zeros(keys.shape[0], 1, activations.first, 1)
    for layer in range(site.layer + 1):
        cache.update(length, length, layer)
    for layer, (key, value) in enumerate(activations.past, start=site.layer + 1):
        cache.update(key, value, layer)
    return cache
