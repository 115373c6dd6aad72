"""Passes and products in bfloat16 of what is in float32, on a CPU that multiplies such numbers several times as fast.

Passes are for what is learned from many texts, and means of keys over those; products, for weights while they are
learned. What is compared word for word, and what an edit stores, is computed in the model's own type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.environment import has_quick_bfloat16
from wisecli.models.layout.site_interface import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.activations import capture, layers_of
from wisecli.models.running.forward_pass import run_model


@contextmanager
def quick_products(loaded: Loaded, site: Site | None = None) -> Iterator[None]:
    """Return a context in which a model computes in bfloat16 up to a site, or as a whole, where that is quicker.

    Parameters of the layers above the site stay as they are, as they are not run; buffers too, of which rotary
    frequencies must stay exact. Afterwards every parameter is the tensor that it was. A model that multiplies some
    numbers in float32 whatever its own type, and so cannot be run otherwise, stays as it is.
    """
    model = loaded.model
    in_place = loaded.stream is None and model.device.type == "cpu" and model.dtype == torch.float32
    if not in_place or not has_quick_bfloat16():
        yield
        return
    unused: Iterable[nn.Module] = () if site is None else layers_of(model, site)[site.layer + 1 :]
    above = {id(parameter) for layer in unused for parameter in layer.parameters()}
    kept = [(parameter, parameter.data) for parameter in model.parameters() if id(parameter) not in above]
    try:
        for parameter, data in kept:
            parameter.data = data.to(torch.bfloat16)
        if not _runs(loaded, site):
            for parameter, data in kept:
                parameter.data = data
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def quick_linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what ``F.linear`` does, in float32, with a product in bfloat16 where a CPU is quicker at that.

    For weights that are being learned: their gradients are in bfloat16, too, and the weights themselves are not.
    """
    if values.device.type != "cpu" or not has_quick_bfloat16():
        return F.linear(values.float(), weight, bias)
    added = None if bias is None else bias.bfloat16()
    return F.linear(values.bfloat16(), weight.bfloat16(), added).float()


def quick_dropout(values: Tensor, share: float) -> Tensor:
    """Return values of which about a share, in steps of 1/256, is 0 and the others are as much larger."""
    return values * quick_mask(values.shape, share, values.device)


def quick_mask(shape: Sequence[int], share: float, device: torch.device) -> Tensor:
    """Return what values of a shape are multiplied by, that about a share of them, in steps of 1/256, is 0 and the
    others are as much larger.

    A CPU draws eight at once, which takes less time.
    """
    dropped, count = round(share * 256), math.prod(shape)
    if device.type != "cpu":  # of which some cannot draw from all whole numbers
        return F.dropout(torch.ones(tuple(shape), device=device), dropped / 256)
    drawn = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)
    return (drawn.view(torch.uint8)[:count].view(tuple(shape)) >= dropped) / (1 - dropped / 256)


def _runs(loaded: Loaded, site: Site | None) -> bool:
    """Return whether a model can be run as it is, up to a site or as a whole."""
    batch = collate([Row((0, 1), (1,))]).to(loaded.model.device)
    try:
        if site is None:
            run_model(loaded.model, batch)
        else:
            capture(loaded.model, site, batch, above=False)
    except Exception:  # what an arbitrary model makes of numbers of two types
        return False
    return True
