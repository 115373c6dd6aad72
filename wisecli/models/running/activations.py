"""Activations at the site, computed once, and the layers above it run on them.

Everything below the edited layer is frozen, so for each row only three things are ever needed again: the *keys* ``a``
of the site, the *hidden* states ``h`` that leave the edited layer, and what the layers above need of earlier columns:
the attention cache that the prompt leaves there, or the states that enter them. A change ``Δ`` of a matrix turns ``h``
into ``h + Δ a``; where the matrix' output passes a norm before it joins the residual stream, that *output* is kept too,
and the norm is taken anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wisecli.models.layout.architectures import ALL, CACHED
from wisecli.models.layout.site_interface import Site
from wisecli.models.prompts.tokenization import Batch
from wisecli.models.running.forward_pass import Selection, run_model
from wisecli.models.running.hooks import giving, hooked, overridden
from wisecli.models.running.prefix_cache import Prefix, PrefixCache, empty_cache, tensors_of
from wisecli.models.streaming.layer_sweep import left_by_sweep, sweep_to_site
from wisecli.models.streaming.tensor_spill import Spool
from wisecli.routing.layers.layer_states import state_of

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from wisecli.models.streaming.layer_stream import LayerStream


@dataclass(frozen=True)
class Activations:
    """What the unedited model computes at the site, for the columns from ``first`` on.

    Shapes: ``keys`` (B, T - first, width), ``hidden`` (B, T - first, d), ``logits`` (n, V) at the selected columns,
    ``past`` keys and values (B, heads, first, d_head) of each layer above the site; ``before`` (B, first, d) what left
    the edited layer there, if those run on whole rows. ``output`` (B, T - first, d) is what the matrix gave, kept only
    where it passes the ``norm`` before it is added. ``lower`` (B, T - first, d) is what left a layer below the site, if
    that was asked for.
    """

    batch: Batch
    first: int
    keys: Tensor
    hidden: Tensor
    logits: Tensor
    past: tuple[tuple[Tensor, Tensor], ...]
    tuple_width: int
    multiplier: float = 1.0
    norm: nn.Module | None = None
    output: Tensor | None = None
    before: Tensor | None = None
    lower: Tensor | None = None

    def with_update(self, update: Tensor) -> Tensor:
        """Return what leaves the layer once ``update`` is added to what the matrix gives: (B, T - first, d) twice."""
        update = update.to(self.hidden.dtype)
        if self.norm is None or self.output is None:
            return self.hidden + (update if self.multiplier == 1 else self.multiplier * update)
        change: Tensor = self.norm(self.output + update) - self.norm(self.output)
        return self.hidden + (change if self.multiplier == 1 else self.multiplier * change)

    def from_window(self) -> Activations:
        """Return the activations from the prompt's last token on: ``Δ`` changes no earlier column."""
        cut = self.batch.start - self.first
        past = tuple((k[:, :, : self.batch.start].clone(), v[:, :, : self.batch.start].clone()) for k, v in self.past)
        keys, hidden = self.keys[:, cut:].clone(), self.hidden[:, cut:].clone()
        output = None if self.output is None else self.output[:, cut:].clone()
        before = None if self.before is None else torch.cat([self.before, self.hidden[:, :cut]], 1)
        return replace(self, first=self.batch.start, keys=keys, hidden=hidden, past=past, output=output, before=before)

    def rows(self, index: Tensor) -> Activations:
        """Return the same for some of the rows."""
        past = tuple((k[index], v[index]) for k, v in self.past) if self.first else ()
        output = None if self.output is None else self.output[index]
        return replace(
            self,
            batch=self.batch.rows(index),
            keys=self.keys[index],
            hidden=self.hidden[index],
            past=past,
            output=output,
            before=None if self.before is None else self.before[index],
        )


@torch.no_grad()
def capture(
    model: PreTrainedModel, site: Site, batch: Batch, *, select: Selection | None = None, above: bool = True
) -> Activations:
    """Run the model once over a batch and keep what later steps need.

    Args:
        select: rows and columns whose logits are wanted; none by default, which spares the vocabulary projection.
        above: whether the layers above the site are wanted at all; without them only keys and hidden states are kept.
    """
    return _capture(model, site, batch, _cache_of(site), select=select, above=above)


def _cache_of(site: Site) -> DynamicCache | None:
    """Return an empty attention cache if the layers above need one, or ``None``."""
    return empty_cache() if site.above == CACHED else None


def _capture(
    model: PreTrainedModel,
    site: Site,
    batch: Batch,
    cache: DynamicCache | None,
    *,
    select: Selection | None,
    above: bool,
    lower: str | None = None,
) -> Activations:
    """Return what :func:`capture` does, of the columns that the cache does not hold yet.

    Args:
        lower: the path of a layer below the site whose output is wanted, too.
    """
    kept: dict[str, Any] = {}
    first = 0 if cache is None else cache.get_seq_length()

    def keep_keys(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept.update(keys=site.keys(inputs, output), output=output)

    def keep_hidden(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept["hidden"] = output

    def keep_lower(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept["lower"] = state_of(output, site.streams)

    with ExitStack() as hooks:
        hooks.enter_context(hooked(site.watched(model).register_forward_hook(keep_keys)))
        hooks.enter_context(hooked(model.get_submodule(site.layer_module).register_forward_hook(keep_hidden)))
        if lower is not None:
            hooks.enter_context(hooked(model.get_submodule(lower).register_forward_hook(keep_lower)))
        if not above:
            hooks.enter_context(overridden(layers_of(model, site)[site.layer + 1 :], lambda *_, **__: kept["hidden"]))
        logits = run_model(model, batch, select, first=first, cache=cache)
    hidden = kept["hidden"]
    width = len(hidden) if isinstance(hidden, (tuple, list)) else 0
    past = tuple(tensors_of(layer) for layer in cache.layers[site.layer + 1 :]) if above and cache is not None else ()
    norm = model.get_submodule(site.norm) if site.norm is not None else None
    states = state_of(hidden, site.streams)
    output = None if norm is None else kept["output"]
    before = None if site.above == CACHED else states[:, :0]
    end = (width, site.multiplier, norm, output, before, kept.get("lower"))
    return Activations(batch, first, kept["keys"], states, logits, past, *end)


def captured(
    model: PreTrainedModel,
    site: Site,
    batches: Iterable[Batch],
    *,
    stream: LayerStream | None = None,
    labelled: bool = False,
    above: bool = True,
    window: bool = False,
    shared: bool = False,
    lower: str | None = None,
) -> Iterator[Activations]:
    """Yield the :func:`capture` of every batch in turn; a streamed layer is read once for all batches, unless layers
    need more of those below them than the states that leave the last.

    Hooks on modules up to the site see the batches in order either way.

    Args:
        labelled: whether the logits at the labelled columns are wanted.
        above: whether the layers above the site are wanted at all.
        window: keep columns from the prompt's last token on only, as :meth:`Activations.from_window` does.
        shared: read what all rows of a batch begin with once; hooks then see neither all columns nor only batches.
        lower: the path of a layer below the site whose output is wanted, too; whole, whatever the window. Of a streamed
            model there are no keys then.
    """
    if stream is not None and site.above != ALL:
        yield from _swept(
            model, site, list(batches), stream, labelled=labelled, above=above, window=window, lower=lower
        )
        return
    beginnings = PrefixCache(partial(_read, model, site, above, lower))
    shared = shared and site.above == CACHED
    for batch in batches:
        select, beginning = batch.labelled if labelled else None, beginnings.prefix_of(batch) if shared else None
        cache = beginning.cache(batch) if beginning else _cache_of(site)
        with torch.no_grad():
            activations = _capture(model, site, batch, cache, select=select, above=above, lower=lower)
        if window:
            yield activations.from_window()
        else:
            yield _with_prefix(activations, beginning) if beginning else activations


@torch.no_grad()
def _read(
    model: PreTrainedModel, site: Site, above: bool, lower: str | None, batch: Batch, cache: DynamicCache
) -> tuple[Tensor, ...]:
    """Return what is kept of each column of a batch, filling the cache."""
    return tuple(_of_columns(_capture(model, site, batch, cache, select=None, above=above, lower=lower)).values())


def _of_columns(found: Activations) -> dict[str, Tensor]:
    """Return what is kept of each column, by its name."""
    names = ("keys", "hidden", "output", "lower")
    return {name: tensor for name in names if (tensor := getattr(found, name)) is not None}


def _with_prefix(activations: Activations, beginning: Prefix) -> Activations:
    """Return activations together with the columns of the rows' common prefix."""
    own = _of_columns(activations)
    before = dict(zip(own, beginning.before(activations.batch), strict=True))
    whole: dict[str, Any] = {name: torch.cat([before[name], own[name]], 1) for name in own}
    return replace(activations, first=0, **whole)


@torch.no_grad()
def _swept(
    model: PreTrainedModel,
    site: Site,
    batches: list[Batch],
    stream: LayerStream,
    *,
    labelled: bool,
    above: bool,
    window: bool,
    lower: str | None,
) -> Iterator[Activations]:
    """Yield the activations of each batch, with every layer's weights read once for all batches."""
    with Spool(stream.spool_bytes) as spool:
        passes = [partial(run_model, model, batch, cache=_cache_of(site)) for batch in batches]
        starts = [batch.start if window else 0 for batch in batches]
        norm = sweep_to_site(model, stream, passes, site, spool, starts, lower)
        for number, batch in enumerate(batches):
            cut = batch.start if window else 0
            hidden = spool.take(f"hidden.{number}")
            logits = hidden.new_empty(0, len(model.get_output_embeddings().get_parameter("weight")))
            past: tuple[tuple[Tensor, Tensor], ...] = ()
            if above:
                logits, past = _run_above(model, site, stream, batch, hidden, batch.labelled if labelled else None)
            before = None if site.above == CACHED else hidden[:, :cut].clone()
            if window:
                past = tuple((keys[:, :, :cut].clone(), values[:, :, :cut].clone()) for keys, values in past)
                hidden = hidden[:, cut:].clone()
            left = {name: spool.take(f"{name}.{number}") for name in left_by_sweep(site, lower)}
            keys = left.pop("keys", hidden[..., :0])
            end = (stream.width, site.multiplier, norm, left.get("output"), before, left.get("lower"))
            yield Activations(batch, cut, keys, hidden, logits, past, *end)


def _run_above(
    model: PreTrainedModel, site: Site, stream: LayerStream, batch: Batch, hidden: Tensor, select: Selection | None
) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
    """Return logits (n, V) and the attention cache of the layers above, run on what leaves the edited one."""
    cache = _cache_of(site)
    with giving(layers_of(model, site)[: site.layer + 1], hidden, stream.width):
        logits = run_model(model, batch, select, cache=cache)
    kept = () if cache is None else cache.layers[site.layer + 1 :]
    return logits, tuple(tensors_of(layer) for layer in kept)


def layers_of(model: PreTrainedModel, site: Site) -> nn.ModuleList:
    """Return the decoder layers among which the edited one is."""
    layers = model.get_submodule(site.layer_module.rpartition(".")[0])
    assert isinstance(layers, nn.ModuleList)
    return layers
