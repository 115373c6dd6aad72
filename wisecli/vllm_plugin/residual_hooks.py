"""Add residuals to what a layer of vLLM's computes: the one place that knows where a memory is put.

Beside a feed-forward's down projection: what multiplies a layer's weights in vLLM is an object of the layer, its
``quant_method``, which a layer of LoRA asks as well as the layer itself does. So the residual is added by another such
object around it. Neither the layer nor its type change, which vLLM's LoRA and weight loading go by.

Behind a decoder layer: the layer gets a type of its own that adds to what it returns. Most return two tensors, and
whether their sum is the state that leaves the layer, or the first is, says the layer behind, by what it reads.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from wisecli.routing.layers.module_types import ModuleMixin, add_mixin
from wisecli.routing.passes.engine_checks import LostMemoryError
from wisecli.vllm_plugin.engine_names import LAYER, LIBRARY, OPERATOR

_LIBRARY = Library(LIBRARY, "FRAGMENT")


@eager_break_during_capture  # type: ignore[untyped-decorator]
def add_residuals(answer: Tensor, keys: Tensor | None, rest: Tensor | None, layer: str) -> None:
    """Add a memory's residuals to an answer (…, d) in place: an opaque operator.

    A CUDA graph that is recorded while it runs ends here, as at attention: how many tokens are routed is no constant.

    Args:
        keys: what goes into the matrix that gives the answer (…, d_ff); none behind a decoder layer.
        rest: what else a decoder layer gives (…, d), which may still be to be added to the answer.
        layer: what vLLM knows the memory by.
    """
    context = get_forward_context()
    memory = context.no_compile_layers[layer]
    # Models of vLLM's Transformers backend put all tokens into one row of a batch.
    rows, real = answer.view(-1, answer.shape[-1]), context.attn_metadata is not None
    if keys is None:
        memory.add_to(rows, partial(states_behind, rows, rest, memory.adds_rest), real=real)
    else:
        memory.add_to(rows, partial(keys_beside, keys.view(-1, keys.shape[-1]), memory.cut), real=real)


def _add_residuals_fake(answer: Tensor, keys: Tensor | None, rest: Tensor | None, layer: str) -> None:
    """Do nothing: a traced graph needs to know only that the answer changes."""


direct_register_custom_op(
    OPERATOR, add_residuals, mutates_args=["answer"], fake_impl=_add_residuals_fake, target_lib=_LIBRARY
)


def keys_beside(keys: Tensor, cut: bool, tokens: Tensor) -> tuple[Tensor, bool]:
    """Return the keys (n, d_ff) of some tokens, and whether this process is to add what they open.

    Args:
        keys: what goes into the matrix (T, d_ff).
        cut: whether every process has its part of each key, and of an answer that all of them add up.
        tokens: their places (n,).
    """
    if not cut:
        return keys[tokens], True
    return tensor_model_parallel_all_gather(keys[tokens]), get_tensor_model_parallel_rank() == 0


def states_behind(first: Tensor, rest: Tensor | None, adds_rest: bool, tokens: Tensor) -> tuple[Tensor, bool]:
    """Return the states (n, d) that leave a decoder layer at some tokens; every process has them whole.

    Args:
        first, rest: what the layer gives (T, d).
        adds_rest: whether the states are the sum of both.
        tokens: their places (n,).
    """
    own = first[tokens]
    return (own if rest is None or not adds_rest else own + rest.view(-1, rest.shape[-1])[tokens]), True


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
        torch.ops.wise.add_residuals(answer, x, None, LAYER)
        return answer


def path_in(model: Any, module: str) -> str:
    """Return the path in vLLM's model of what the base has at path ``module``."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = None if mapper is None else mapper.map_name(f"{module}.weight")
    return module if mapped is None else str(mapped).removesuffix(".weight")


class AddsBehind(ModuleMixin):
    """A decoder layer that adds a memory's residuals to what it gives."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer gives, with the residuals of tokens that a memory answers."""
        output = super().forward(*args, **kwargs)
        first, *others = (output,) if isinstance(output, Tensor) else output
        rest = next((tensor for tensor in others if isinstance(tensor, Tensor)), None)
        torch.ops.wise.add_residuals(first, None, rest, LAYER)
        return output


def put(model: nn.Module, module: str, *, behind: bool) -> bool:
    """Have residuals added where a memory at path ``module`` is; returns whether processes have parts of its keys.

    Args:
        behind: whether that is behind the decoder layer above the path's last part, not beside the matrix there.

    Raises:
        LostMemoryError: vLLM's model has no such layer.
    """
    path = module.rpartition(".")[0] if behind else module
    try:
        layer: Any = model.get_submodule(path)
    except AttributeError as error:
        raise LostMemoryError(f"the edits are lost: {type(model).__name__} has no {path}") from error
    if behind:
        add_mixin(layer, AddsBehind)
        return False
    inner = getattr(layer, "quant_method", None)
    if not isinstance(inner, QuantizeMethodBase):
        raise LostMemoryError(f"the edits are lost: {type(layer).__name__} was put in the place of {path}")
    layer.quant_method = RoutedMethod(inner)
    layer.requires_unquantized_input = True  # else an activation before it may give eight bits, which are no keys
    whole: int | None = getattr(layer, "input_size", None)
    return bool(getattr(layer, "input_size_per_partition", whole) != whole)
