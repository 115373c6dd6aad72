"""Checks a layout that was inferred from a model's modules against what the model does when it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from wisecli.errors import ModelError, reason_of
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import ALL, CACHED, ROWS, Above, Layout
from wisecli.models.layout.padding_probe import alike, probe_rows, tolerance_of, vocabulary_rows
from wisecli.models.layout.site import Site, find_site
from wisecli.models.prompts.tokenization import Batch, collate
from wisecli.models.running.activations import capture, layers_of
from wisecli.models.running.forward_pass import CACHE_ARGUMENT, run_model
from wisecli.models.running.hooks import hooked
from wisecli.models.running.prefix_cache import empty_cache, tensors_of
from wisecli.models.running.upper_layers import upper_logits
from wisecli.routing.layers.module_types import accepted_arguments
from wisecli.routing.passes.token_cache import cache_given

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def observed_layout(model: PreTrainedModel, site: Site, layout: Layout) -> Layout:
    """Return the layout with how the matrix' output joins the residual stream, as a change of it shows.

    Raises:
        ModelError: the output does something else than join the stream.
    """
    layer = model.get_submodule(site.layer_module)
    ids = torch.arange(16, device=model.device)[None] % vocabulary_rows(model)
    output, before = _run(model, site, ids, None)
    if output.shape != before.shape:
        raise _elsewhere(site)
    shift = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    shift *= output.float().square().mean().sqrt().to(output)
    change = (_run(model, site, ids, shift)[1] - before).float()
    tolerance = tolerance_of(model)
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


def _elsewhere(site: Site) -> ModelError:
    return ModelError(
        f"what {site.module} gives does not join the residual stream as it is or through one norm; "
        "name another matrix with --set target_module=PATH"
    )


def verified_layout(
    model: PreTrainedModel, directory: Path, checkpoint: Checkpoint, layout: Layout, layer: str | int
) -> Layout:
    """Return a complete layout, as the loaded model shows it.

    Args:
        layer: the layer to look at.

    Raises:
        ModelError: the model cannot be edited.
    """
    if layout.known:
        return layout
    free = layout.behind_layers()
    free = _with_states(model, find_site(directory, checkpoint, layer, free), free)
    behind = find_site(directory, checkpoint, layer, free)
    above = above_of(model, lambda above: find_site(directory, checkpoint, layer, replace(free, above=above)))
    require_known_context(model)
    if layout.value is None:
        return replace(free, above=above, decoder=decoder_of(model, behind))
    found = observed_layout(model, find_site(directory, checkpoint, layer, layout), layout)
    check_split(model, find_site(directory, checkpoint, layer, found))
    return found


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
        logits = upper_logits(model, site, window, window.hidden, batch.labelled)
    except Exception as error:  # what an arbitrary model makes of a cache that is not its own
        raise ModelError(f"the layers above {site.module} cannot be run alone; edit another model") from error
    if not alike(model, logits, activations.logits):
        raise ModelError(f"the layers above {site.module} alone do not give the model's answers; edit another model")


@torch.no_grad()
def above_of(model: PreTrainedModel, run_by: Callable[[Above], Site]) -> Above:
    """Return how the layers above a site run by themselves: the cheapest that changes nothing.

    Args:
        run_by: the site, for layers above that run so.

    Raises:
        ModelError: nothing that is added at the site changes what the model says, or the model reads ahead.
    """
    batch = _batch(model)
    plain = run_model(model, batch, batch.labelled)
    _require_causal(model, batch, plain)
    site = run_by(ALL)
    expected = _shifted(model, site, batch)
    if alike(model, expected, plain):
        raise ModelError(f"what is added behind {site.layer_module} does not change what the model says")
    for above in (CACHED, ROWS):
        with suppress(Exception):  # what an arbitrary model makes of a cache or of states that are not its own
            same = alike(model, _shifted(model, run_by(above), batch), expected)
            if same and (above == ROWS or _goes_on(model, site, batch, plain)):
                return above
    return ALL


def _require_causal(model: PreTrainedModel, batch: Batch, plain: Tensor) -> None:
    """Check that what a model predicts at a token does not depend on later tokens."""
    other = batch.ids.clone()
    other[:, -1] = (other[:, -1] + 1) % vocabulary_rows(model)
    logits = run_model(model, replace(batch, ids=other), batch.labelled)
    before = batch.labelled[1] < batch.ids.shape[1] - 1
    if not alike(model, logits[before], plain[before]):
        raise ModelError("the model reads ahead, so that it generates no text; set is_decoder in its config.json")


@torch.no_grad()
def require_known_context(model: PreTrainedModel) -> None:
    """Check that generation reads a prompt's own tokens, and that every pass shows which came before it.

    Raises:
        ModelError: the model keeps them elsewhere than in a cache that passes are given, or adds some to them.
    """
    short: list[bool] = []
    first: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", args[0] if args else None)
        first.extend([ids] if ids is not None and not first else ())
        short.append(ids is not None and ids.shape[1] == 1 and not isinstance(cache_given(named), Cache))

    batch = _batch(model)
    with hooked(model.register_forward_pre_hook(note, with_kwargs=True)):
        settings = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}  # nosec B105
        try:
            model.generate(batch.ids, attention_mask=batch.mask, **settings)  # type: ignore[operator]  # a mixin's method
        except Exception as error:  # what an arbitrary model makes of a batch
            kind, reason = type(model).__name__, reason_of(error)
            raise ModelError(f"{kind} generates nothing from padded rows ({reason}); edit another model") from error
    if first and not torch.equal(first[0], batch.ids):
        raise ModelError(
            f"{type(model).__name__} adds tokens of its own to what it is given, and answers there; edit another model"
        )
    if any(short):
        raise ModelError(
            f"{type(model).__name__} keeps what it has read outside of a cache of tokens, so that no pass says which "
            "prompt it goes on with; edit another model"
        )


def _shifted(model: PreTrainedModel, site: Site, batch: Batch) -> Tensor:
    """Return logits (n, V) with something added to the layer's output from the prompts' last tokens on."""
    window = capture(model, site, batch).from_window()
    shift = torch.randn(window.hidden.shape, generator=torch.Generator().manual_seed(0)).to(window.hidden)
    shift *= window.hidden.float().square().mean().sqrt().to(shift)
    return upper_logits(model, site, window, window.with_update(shift), batch.labelled)


def _goes_on(model: PreTrainedModel, site: Site, batch: Batch, plain: Tensor) -> bool:
    """Return whether a pass with an attention cache, one a layer, gives what one over the whole row does."""
    cache, cut = empty_cache(), batch.start - 1
    begun = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    begun = {name: tensor[:, :cut] for name, tensor in begun.items()}
    model(**accepted_arguments(type(model), {**begun, "use_cache": True, CACHE_ARGUMENT: cache}))
    all_tensors = all(isinstance(tensor, Tensor) for layer in cache.layers for tensor in tensors_of(layer))
    if not all_tensors or len(cache.layers) != len(layers_of(model, site)):
        return False
    return alike(model, run_model(model, batch, batch.labelled, first=cut, cache=cache), plain)


@torch.no_grad()
def decoder_of(model: PreTrainedModel, site: Site) -> str | None:
    """Return the path of the outermost module below the head that is given token ids; ``None`` if it is the usual one.

    Raises:
        ModelError: no module is given token ids.
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
        run_model(model, batch, batch.labelled)
    if not given:
        raise ModelError(f"no part of the model around {site.layer_module} is given tokens; edit another model")
    return None if given[0] == model.base_model_prefix else given[0]


@torch.no_grad()
def _with_states(model: PreTrainedModel, site: Site, layout: Layout) -> Layout:
    """Return a layout with the axis of several streams in what a layer gives, and the width of its states.

    Raises:
        ModelError: it gives no states (B, T, d), with or without that axis.
    """
    kept: list[Any] = []
    batch = _batch(model)
    with hooked(site.watched(model).register_forward_hook(lambda _module, _inputs, output: kept.append(output))):
        try:
            run_model(model, batch)
        except Exception as error:  # what an arbitrary model makes of tokens alone
            raise ModelError(f"the model does not run on tokens alone ({reason_of(error)}); edit another") from error
    if len(kept) != 1:
        raise ModelError(
            f"{site.layer_module} runs {len(kept)} times a pass, and edits are made for one; choose another layer with "
            "--layer, or edit a model whose layers run one after the other"
        )
    output = kept[0][0] if isinstance(kept[0], (tuple, list)) else kept[0]
    shape, wanted = tuple(getattr(output, "shape", ())), (*batch.ids.shape, site.d)
    if shape[:-1] == wanted[:-1]:
        return replace(layout, width=shape[-1])
    for axis in (0, 2):
        if len(shape) == len(wanted) + 1 and shape[:axis] + shape[axis + 1 :] == wanted:
            return replace(layout, streams=axis)
    raise ModelError(f"{site.layer_module} gives no states (rows, tokens, {site.d}) but {shape}; edit another model")


def _batch(model: PreTrainedModel) -> Batch:
    return collate(probe_rows(model, (5, 2))).to(model.device)


def _run(model: PreTrainedModel, site: Site, ids: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what the matrix gives and what leaves its layer, with the shift added to the former: (1, T, d) twice."""
    kept: dict[str, Tensor] = {}

    def matrix(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        kept["output"] = output.clone()
        return output if shift is None else output + shift

    def layer(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept["hidden"] = output[0] if isinstance(output, tuple) else output

    changed = model.get_submodule(site.module).register_forward_hook(matrix)
    with hooked(changed, model.get_submodule(site.layer_module).register_forward_hook(layer)):
        model(input_ids=ids, use_cache=False)
    return kept["output"], kept["hidden"]


def _close(change: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((change - expected).norm()) <= tolerance * float(change.norm()) and float(change.norm()) > 0
