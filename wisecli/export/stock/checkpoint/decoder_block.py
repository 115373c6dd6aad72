"""A decoder block as data: the tensors of one layer, of which most may be left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wisecli.export.stock.checkpoint.widening import Widening

# What ends in the residual stream; Granite multiplies it.
_ADDS = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a decoder layer: of the stream, of the feed-forward, of all queries, and of keys or values.

    ``attention_bias`` says whether its attention has biases; its feed-forward always has.
    """

    hidden: int
    width: int
    queries: int
    shared: int
    attention_bias: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LayerSizes:
        """Return the sizes that a config gives."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        size = int(config.get("head_dim") or hidden // heads)
        shared = int(config.get("num_key_value_heads") or heads) * size
        return cls(hidden, int(config["intermediate_size"]), heads * size, shared, bool(config.get("attention_bias")))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor inside a layer, by its name there."""
        matrices = {
            "self_attn.q_proj": (self.queries, self.hidden),
            "self_attn.k_proj": (self.shared, self.hidden),
            "self_attn.v_proj": (self.shared, self.hidden),
            "self_attn.o_proj": (self.hidden, self.queries),
            "mlp.gate_proj": (self.width, self.hidden),
            "mlp.up_proj": (self.width, self.hidden),
            "mlp.down_proj": (self.hidden, self.width),
        }
        weights = {f"{name}.weight": shape for name, shape in matrices.items()}
        return dict.fromkeys(_NORMS, (self.hidden,)) | weights | self.biases

    @property
    def biases(self) -> dict[str, tuple[int, ...]]:
        """The shape of every bias inside a layer, by its name there."""
        shapes = {"mlp.gate_proj": self.width, "mlp.up_proj": self.width, "mlp.down_proj": self.hidden}
        if self.attention_bias:
            lengths = (self.queries, self.shared, self.shared, self.hidden)
            shapes |= {f"self_attn.{letter}_proj": length for letter, length in zip("qkvo", lengths, strict=True)}
        return {f"{name}.bias": (length,) for name, length in shapes.items()}


@dataclass(frozen=True)
class DecoderBlock:
    """The ``tensors`` of a decoder layer, by their names inside it, such as ``self_attn.q_proj.weight``.

    Weights and biases that are left out are zero. A norm that is left out reads the base model's channels as one of
    weight 1 would in the base, and extra ones as they are. What ``o_proj`` and ``down_proj`` give is what the stream
    gets, whatever the architecture multiplies it by.
    """

    tensors: Mapping[str, Tensor]

    @property
    def attention_bias(self) -> bool:
        """Whether its attention has a bias."""
        return any(name.startswith("self_attn.") and name.endswith(".bias") for name in self.tensors)

    def require(self, sizes: LayerSizes) -> None:
        """Check names and shapes.

        Raises:
            ValueError: a tensor is none of a layer of those sizes.
        """
        for name, tensor in self.tensors.items():
            if (wanted := sizes.shapes.get(name)) != tuple(tensor.shape):
                raise ValueError(f"a block's tensor {name} has shape {tuple(tensor.shape)}, not {wanted}")

    def written(
        self, sizes: LayerSizes, widening: Widening, multiplier: float, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the layer in the type that it is stored in; norms of a wider stream in float32.

        Args:
            multiplier: by what the architecture multiplies what a layer adds.
        """
        for name, shape in sizes.shapes.items():
            norm = name in _NORMS
            if (tensor := self.tensors.get(name)) is None:
                tensor = widening.unit_norm() if norm else torch.zeros(shape, dtype=dtype)
            elif name in _ADDS and multiplier != 1:
                # In double precision, so that what was multiplied in it before comes back as it was.
                tensor = (tensor.double() / multiplier).float()
            yield name, tensor.to(torch.float32 if norm and widening.changes else dtype)


class AddedBlocks(NamedTuple):
    """The decoder blocks that the base does not have: ``behind`` the router's layer, and behind the ``last``."""

    behind: Sequence[DecoderBlock]
    last: Sequence[DecoderBlock] = ()
