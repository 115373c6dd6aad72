"""A layout that was read off a model, held against what the model does when it runs."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wisecli.errors import ModelError
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.activations import capture
from wisecli.models.architectures import ALL, CACHED, ROWS, Above, Layout
from wisecli.models.beginnings import empty_cache
from wisecli.models.forward_pass import CACHE_ARGUMENT, run_model
from wisecli.models.hooks import hooked
from wisecli.models.matrix_site import MatrixSite, as_matrix
from wisecli.models.site import LayerSite, Site, find_site
from wisecli.models.suffix import suffix_logits
from wisecli.models.tokenization import Batch, Row, collate
from wisecli.routing.passes import taken_by


@torch.no_grad()
def observed(model: PreTrainedModel, site: MatrixSite, layout: Layout) -> Layout:
    """The layout with how the matrix' output joins the residual stream, as a change of it in the loaded model shows.

    Raises:
        ModelError: the output does something else than join the stream.
    """
    layer = model.get_submodule(site.layer_module)
    ids = torch.arange(16, device=model.device)[None] % len(model.get_input_embeddings().get_parameter("weight"))
    output, before = _run(model, site, ids, None)
    if output.shape != before.shape:
        raise _elsewhere(site)
    shift = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    shift *= output.float().square().mean().sqrt().to(output)
    change = (_run(model, site, ids, shift)[1] - before).float()
    tolerance = _tolerance(model)
    factor = float((change * shift.float()).sum() / shift.float().square().sum())
    if _close(change, factor * shift.float(), tolerance):
        return replace(layout, multiplier=1.0 if abs(factor - 1) < tolerance else factor)
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (site.d,):
            through = (module(output + shift) - module(output)).float()
            if _close(change, through, tolerance):
                return replace(layout, norm=name)
    raise _elsewhere(site)


def _elsewhere(site: MatrixSite) -> ModelError:
    return ModelError(
        f"what {site.module} gives does not join the residual stream as it is or through one norm; "
        "name another matrix with --target-module"
    )


def settled(
    model: PreTrainedModel,
    directory: Path,
    checkpoint: Checkpoint,
    layout: Layout,
    layer: str | int,
    *,
    lookup: bool,
) -> Layout:
    """A layout in which nothing is left open, as the loaded model shows.

    Args:
        layer: the layer to look at.
        lookup: whether edits may be added behind layers, should the matrix not do.

    Raises:
        ModelError: the model cannot be edited.
    """
    if layout.known:
        return layout
    behind = find_site(directory, checkpoint, layer, layout.behind_layers())
    if (width := _states(model, behind).shape[-1]) != behind.d:
        raise ModelError(f"states of {width} numbers leave {behind.layer_module}, not {behind.d} as config.json says")
    above = above_of(model, behind)
    if layout.value is not None and (not lookup or above == CACHED):
        try:
            found = observed(model, as_matrix(find_site(directory, checkpoint, layer, layout)), layout)
            check_split(model, find_site(directory, checkpoint, layer, found))
        except ModelError:
            if not lookup:
                raise
        else:
            if not lookup or found.norm is None:
                return found
    return replace(layout.behind_layers(), above=above, decoder=decoder_of(model, behind))


@torch.no_grad()
def check_split(model: PreTrainedModel, site: Site) -> None:
    """Check that the layers above the site, run on captured activations, give what the whole model gives.

    Raises:
        ModelError: they do not: the model keeps something else from token to token than attention's keys and values.
    """
    batch = _batch(model)
    try:
        activations = capture(model, site, batch, select=batch.labelled)
        window = activations.from_window()
        logits = suffix_logits(model, site, window, window.hidden, batch.labelled)
    except Exception as error:  # what an arbitrary model makes of a cache that is not its own
        raise ModelError(f"the layers above {site.module} cannot be run alone; edit another model") from error
    if not _alike(model, logits, activations.logits):
        raise ModelError(f"the layers above {site.module} alone do not give the model's answers; edit another model")


@torch.no_grad()
def above_of(model: PreTrainedModel, site: Site) -> Above:
    """How the layers above a site that takes any way run by themselves: the cheapest that changes nothing.

    Raises:
        ModelError: nothing that is added at the site changes what the model says.
    """
    batch = _batch(model)
    plain = run_model(model, batch, 0, None, batch.labelled)
    shifted = partial(_shifted, model, site, batch)
    expected = shifted(ALL)
    if _alike(model, expected, plain):
        raise ModelError(f"what is added behind {site.layer_module} does not change what the model says")
    for above in (CACHED, ROWS):
        with suppress(Exception):  # what an arbitrary model makes of a cache or of states that are not its own
            if _alike(model, shifted(above), expected) and (above == ROWS or _goes_on(model, batch, plain)):
                return above
    return ALL


def _shifted(model: PreTrainedModel, site: Site, batch: Batch, above: Above) -> Tensor:
    """Logits (n, V) from the prompts' last tokens on, once something is added to what leaves the site's layer there."""
    site = replace(cast(LayerSite, site), above=above)
    window = capture(model, site, batch).from_window()
    shift = torch.randn(window.hidden.shape, generator=torch.Generator().manual_seed(0)).to(window.hidden)
    shift *= window.hidden.float().square().mean().sqrt().to(shift)
    return suffix_logits(model, site, window, window.with_update(shift), batch.labelled)


def _goes_on(model: PreTrainedModel, batch: Batch, plain: Tensor) -> bool:
    """Whether a pass goes on from an attention cache as if it were the whole row's."""
    cache, cut = empty_cache(), batch.start - 1
    begun = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    begun = {name: tensor[:, :cut] for name, tensor in begun.items()}
    model(**taken_by(type(model), {**begun, "use_cache": True, CACHE_ARGUMENT: cache}))
    rows, columns = batch.labelled
    return _alike(model, run_model(model, batch, cut, cache, (rows, columns - cut)), plain)


@torch.no_grad()
def decoder_of(model: PreTrainedModel, site: Site) -> str | None:
    """Path of the outermost module below the head that is given tokens; ``None`` if it is the usual one.

    Raises:
        ModelError: none is.
    """
    given: list[str] = []
    parts = site.layer_module.split(".")[:-2]
    with ExitStack() as hooks:
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])

            def note(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], path: str = path) -> None:
                ids = named.get("input_ids", args[0] if args else None)
                if isinstance(ids, Tensor) and not ids.is_floating_point():
                    given.append(path)

            hooks.enter_context(hooked(model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)))
        batch = _batch(model)
        run_model(model, batch, 0, None, batch.labelled)
    if not given:
        raise ModelError(f"no part of the model around {site.layer_module} is given tokens; edit another model")
    return None if given[0] == model.base_model_prefix else given[0]


def _states(model: PreTrainedModel, site: Site) -> Tensor:
    batch = _batch(model)
    return capture(model, replace(cast(LayerSite, site), above=ALL), batch).hidden


def _batch(model: PreTrainedModel) -> Batch:
    """Two rows of a prompt and a target, of unequal length."""
    count = len(model.get_input_embeddings().get_parameter("weight"))
    rows = [Row(tuple(place % count for place in range(3, 3 + length)), (5 % count, 2 % count)) for length in (9, 4)]
    return collate(rows).to(model.device)


def _alike(model: PreTrainedModel, logits: Tensor, expected: Tensor) -> bool:
    difference = float((logits - expected).float().norm())
    return difference <= _tolerance(model) * float(expected.float().norm())


def _tolerance(model: PreTrainedModel) -> float:
    return 1e-3 if model.dtype == torch.float32 else 0.1


def _run(model: PreTrainedModel, site: MatrixSite, ids: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the matrix gives and what leaves its layer, with the shift added to the former: (1, T, d) twice."""
    kept: dict[str, Tensor] = {}

    def matrix(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        kept["output"] = output.clone()
        return output if shift is None else output + shift

    def layer(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept["hidden"] = output[0] if isinstance(output, tuple) else output

    handles = [
        model.get_submodule(site.module).register_forward_hook(matrix),
        model.get_submodule(site.layer_module).register_forward_hook(layer),
    ]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept["output"], kept["hidden"]


def _close(change: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((change - expected).norm()) <= tolerance * float(change.norm()) and float(change.norm()) > 0
