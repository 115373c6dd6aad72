"""A residual stream with more channels than the base model's, in which every layer computes what it did.

The extra channels are zero wherever no inserted block writes to them. What reads the stream has columns of zeros
for them, what writes to it rows of zeros. An RMS norm divides by the mean over all channels, so with ``d`` channels
of ``D`` its weights are multiplied by ``sqrt(d / D)`` and its epsilon by ``d / D``: the normed state is the base's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.errors import ModelError
from wisecli.io.safetensors_header import TensorLayout

# GGUF's 8-bit rows share a scale among so many numbers.
_ROW_UNIT = 32
# How a tensor is widened: by columns or rows of zeros, as the weights of a norm, or not at all.
_How = Literal["columns", "rows", "norm", "kept"]
# By the last two parts of a tensor's name.
_BY_ENDING: Mapping[str, _How] = {
    **dict.fromkeys(("embed_tokens.weight", "lm_head.weight"), "columns"),
    **dict.fromkeys((f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up")), "columns"),
    **dict.fromkeys((f"{name}_proj.{part}" for name in ("o", "down") for part in ("weight", "bias")), "rows"),
    **dict.fromkeys((f"{name}_proj.bias" for name in ("q", "k", "v", "gate", "up")), "kept"),
    "rotary_emb.inv_freq": "kept",
    **dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"), "norm"),
}


@dataclass(frozen=True)
class Widening:
    """From ``hidden`` channels of the residual stream to ``width``; the identity if both are the same."""

    hidden: int
    width: int

    @classmethod
    def of(cls, config: Mapping[str, Any], extra: int) -> Widening:
        """Return the least widening by ``extra`` channels or more that transformers and GGUF files allow.

        Args:
            config: a base model's settings.
        """
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        unit = math.lcm(heads, _ROW_UNIT)
        return cls(hidden, hidden if extra == 0 else -(-(hidden + extra) // unit) * unit)

    @property
    def changes(self) -> bool:
        """Whether anything becomes wider."""
        return self.width != self.hidden

    @property
    def share(self) -> float:
        """The base model's channels as a share of all: what its epsilon is multiplied by."""
        return self.hidden / self.width

    def unit_norm(self) -> Tensor:
        """Return weights of a norm (width,) that reads the base's channels as one of weight 1 would in the base, and
        the extra ones as they are; in float32.
        """
        weights = torch.ones(self.width)
        weights[: self.hidden] = math.sqrt(self.share)
        return weights

    def layout(self, name: str, layout: TensorLayout) -> TensorLayout:
        """Return type and shape of a tensor of the base model once it is widened; norms are in float32.

        Raises:
            ModelError: it is not known how, or the tensor has another size than the stream.
        """
        if not self.changes or (how := _how(name)) == "kept":
            return layout
        dim = 1 if how == "columns" else 0
        shape = list(layout.shape)
        if len(shape) <= dim or shape[dim] != self.hidden:
            raise ModelError(
                f"the tensor {name} is {layout}, where {self.hidden} channels were expected; use --format routed"
            )
        shape[dim] = self.width
        # Rounded to half precision the factor of a norm would change answers.
        return replace(layout, dtype="float32" if how == "norm" else layout.dtype, shape=tuple(shape))

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the base model with zeros for the extra channels; norms are scaled, in float32.

        Raises:
            ModelError: it is not known how to widen a tensor of that name.
        """
        if not self.changes or (how := _how(name)) == "kept":
            return tensor
        more = self.width - self.hidden
        if how == "columns":
            return F.pad(tensor, (0, more))
        if how == "norm":
            tensor = (tensor.double() * math.sqrt(self.share)).float()
        return F.pad(tensor, (*(0, 0) * (tensor.dim() - 1), 0, more))


def _how(name: str) -> _How:
    found = _BY_ENDING.get(".".join(name.split(".")[-2:]))
    if found is None:
        raise ModelError(f"a wider stream has no known place for the tensor {name}; use --format routed")
    return found
