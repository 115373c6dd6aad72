"""Add residuals to what a layer of vLLM's computes: the one place that knows where a memory is put.

Today that is a feed-forward's down projection. What multiplies a layer's weights in vLLM is an object of the layer, its
``quant_method``, which a layer of LoRA asks as well as the layer itself does. So the residual is added by another such
object around it. Neither the layer nor its type change, which vLLM's LoRA and weight loading go by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from wisecli.routing.serving import LostMemoryError
from wisecli.vllm_plugin.names import LAYER, LIBRARY, OPERATOR

_LIBRARY = Library(LIBRARY, "FRAGMENT")


def add_residuals(keys: Tensor, answer: Tensor, layer: str) -> None:
    """Add a memory's residuals to a layer's answer (…, d), by the keys that go into it (…, d_ff): an opaque operator.

    Args:
        layer: what vLLM knows the memory by.
    """
    context = get_forward_context()
    # Models of vLLM's Transformers backend put all tokens into one row of a batch.
    rows, own = (one.view(-1, one.shape[-1]) for one in (answer, keys))
    context.no_compile_layers[layer].add_to(rows, own, real=context.attn_metadata is not None)


def _add_residuals_fake(keys: Tensor, answer: Tensor, layer: str) -> None:
    """Do nothing: a traced graph needs to know only that the answer changes."""


direct_register_custom_op(
    OPERATOR, add_residuals, mutates_args=["answer"], fake_impl=_add_residuals_fake, target_lib=_LIBRARY
)


class RoutedMethod(QuantizeMethodBase):  # type: ignore[misc]  # of a package without types
    """Multiplies by a layer's weights as another method does, and adds residuals.

    Args:
        inner: the layer's own method; whatever else is asked of this one, it answers.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Do as the layer's own method does."""
        return self.inner.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do as the layer's own method does."""
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product, with the residuals of tokens that a memory answers."""
        answer: Tensor = self.inner.apply(layer, x, bias)
        torch.ops.wise.add_residuals(x, answer, LAYER)
        return answer


def path_in(model: Any, module: str) -> str:
    """Return the path in vLLM's model of what the base has at path ``module``."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = None if mapper is None else mapper.map_name(f"{module}.weight")
    return module if mapped is None else str(mapped).removesuffix(".weight")


def put(model: nn.Module, module: str) -> nn.Module:
    """Have residuals added to what the layer at path ``module`` computes, and return the layer.

    Raises:
        LostMemoryError: vLLM's model has no such layer.
    """
    try:
        layer = model.get_submodule(module)
    except AttributeError as error:
        raise LostMemoryError(f"the edits are lost: {type(model).__name__} has no {module}") from error
    inner = getattr(layer, "quant_method", None)
    if not isinstance(inner, QuantizeMethodBase):
        raise LostMemoryError(f"the edits are lost: {type(layer).__name__} was put in the place of {module}")
    layer.quant_method = RoutedMethod(inner)
    return layer


def whole_keys(keys: Tensor, width: int) -> Tensor:
    """Return whole keys (T, d_ff) of those that tensor parallelism has cut: every process has its part of each.

    Args:
        width: how many numbers a key has.
    """
    if keys.shape[-1] == width:
        return keys
    gathered: Tensor = tensor_model_parallel_all_gather(keys)
    return gathered
