"""A layout that was read off a model, held against what the model does when it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wisecli.errors import ModelError
from wisecli.models.activations import capture, suffix_logits
from wisecli.models.site import Layout, Site
from wisecli.models.tokenization import Row, collate


@torch.no_grad()
def observed(model: PreTrainedModel, site: Site, layout: Layout) -> Layout:
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


def _elsewhere(site: Site) -> ModelError:
    return ModelError(
        f"what {site.module} gives does not join the residual stream as it is or through one norm; "
        "name another matrix with --target-module"
    )


@torch.no_grad()
def check_split(model: PreTrainedModel, site: Site) -> None:
    """Check that the layers above the site, run on captured activations, give what the whole model gives.

    Raises:
        ModelError: they do not: the model keeps something else from token to token than attention's keys and values.
    """
    count = len(model.get_input_embeddings().get_parameter("weight"))
    rows = [Row(tuple(place % count for place in range(3, 3 + length)), (5 % count, 2 % count)) for length in (9, 4)]
    batch = collate(rows).to(model.device)
    try:
        activations = capture(model, site, batch, select=batch.labelled)
        window = activations.from_window()
        logits = suffix_logits(model, site, window, window.hidden, batch.labelled)
    except Exception as error:  # what an arbitrary model makes of a cache that is not its own
        raise ModelError(f"the layers above {site.module} cannot be run alone; edit another model") from error
    difference = float((logits - activations.logits).float().norm())
    if difference > _tolerance(model) * float(activations.logits.float().norm()):
        raise ModelError(f"the layers above {site.module} alone do not give the model's answers; edit another model")


def _tolerance(model: PreTrainedModel) -> float:
    return 1e-3 if model.dtype == torch.float32 else 0.1


def _run(model: PreTrainedModel, site: Site, ids: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
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
