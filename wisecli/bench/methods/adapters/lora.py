"""LoRA (Hu et al. 2022), through ``peft``: low-rank adapters in every layer, trained on one edit after the other.

The adapters stand beside the attention projections and the value matrix. Their layers are in the model only while it
is trained or applied; outside, its own modules stand in their places.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from wisecli.bench.methods.base import Bench, EditByEdit, UnsuitableError, method, require_finite, tensor_bytes
from wisecli.bench.methods.weights.weight_editing import encode_row
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.forward_pass import run_model
from wisecli.models.running.seeding import seeded


@dataclass(frozen=True)
class LoraSettings:
    """As EasyEdit sets it for Llama-7B, but for the rate and the dropout, of which there is none.

    ``rate``: a tenth of EasyEdit's 5e-3, under which a small model says one and the same thing to everything after five
    edits. ``stop``: the loss below which an edit needs no further step.
    """

    rank: int = 8
    alpha: int = 32
    rate: float = 5e-4
    steps: int = 70
    stop: float = 0.01


Swap = tuple[nn.Module, str, nn.Module, nn.Module]


def projections(model: nn.Module, layers: str, value: str) -> list[str]:
    """Return the module paths of the value matrix and of all projections outside the feed-forward part, layer by layer.

    Args:
        layers: module path of the list of layers.
        value: module path of the value matrix inside one.
    """
    feed_forward = value.split(".", 1)[0]
    found = []
    for name, module in model.get_submodule(layers).named_modules():
        inside = name.split(".", 1)[-1]
        attends = isinstance(module, nn.Linear | Conv1D) and inside.split(".", 1)[0] != feed_forward
        if inside == value or attends:
            found.append(f"{layers}.{name}")
    return found


def follow(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Set the parameters' gradients to those of a loss.

    Raises:
        UnsuitableError: the loss is not finite.
    """
    require_finite(loss, "the edits")
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


@method("lora")
class Lora(EditByEdit):
    """Edits in low-rank adapters.

    Raises:
        UnsuitableError: ``peft`` is not installed, or the model's layers are streamed.
    """

    stage = "adapters"

    def __init__(self, bench: Bench, settings: LoraSettings | None = None) -> None:
        if bench.loaded.stream is not None:
            raise UnsuitableError("lora trains all layers at once and needs a model that fits into memory")
        self.bench, self.settings = bench, settings or LoraSettings()
        self._swaps = self._built()
        self.parameters = {
            f"{index}.{name}": parameter
            for index, (*_, layer) in enumerate(self._swaps)
            for name, parameter in layer.named_parameters()
            if "lora_" in name
        }

    def _built(self) -> list[Swap]:
        """Return the adapters' layers, each with the module that it replaces and that module's parent."""
        try:
            from peft import LoraConfig, get_peft_model
            from peft.tuners.lora import LoraLayer
        except ImportError:
            raise UnsuitableError("lora needs the package peft; install it with `pip install peft`") from None
        model: Any = self.bench.loaded.model
        targets = projections(model, self.bench.layout.layers, str(self.bench.layout.value))
        transposed = isinstance(model.get_submodule(targets[0]), Conv1D)
        config = LoraConfig(
            r=self.settings.rank, lora_alpha=self.settings.alpha, target_modules=targets, fan_in_fan_out=transposed
        )
        before = set(vars(model))
        with seeded(self.bench.seed, model.device), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what that has renamed
            get_peft_model(model, config)
        swaps: list[Swap] = []
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LoraLayer) and isinstance(layer, nn.Module):
                above, _, own = name.rpartition(".")
                swaps.append((model.get_submodule(above), own, layer.get_base_layer(), layer.eval()))
        for parent, own, base, _ in swaps:
            setattr(parent, own, base)
        for left in set(vars(model)) - before:
            delattr(model, left)
        return swaps

    def learn(self, edit: Edit) -> None:
        """Train on one edit."""
        row = encode_row(self.bench, edit.prompt, edit)
        trained = list(self.parameters.values())
        optimizer = torch.optim.Adam(trained, lr=self.settings.rate)
        with self.applied():
            for _ in range(self.settings.steps):
                with torch.enable_grad():
                    loss = self.loss([row])
                if float(loss.detach()) < self.settings.stop:
                    break
                follow(loss, trained)
                optimizer.step()
        optimizer.zero_grad()

    def loss(self, rows: Sequence[Row]) -> Tensor:
        """Return the mean cross-entropy of the target tokens of rows, with the adapters as they are applied."""
        loaded = self.bench.loaded
        batch = collate(rows).to(loaded.device)
        logits = run_model(loaded.model, batch, batch.labelled)
        return F.cross_entropy(logits.float(), batch.targets)

    @contextmanager
    def applied(self, first: int | None = None) -> Iterator[None]:  # noqa: ARG002
        """Replace modules of the model by the adapters' layers within a ``with`` block."""
        try:
            for parent, name, _, layer in self._swaps:
                setattr(parent, name, layer)
            yield
        finally:
            for parent, name, base, _ in self._swaps:
                setattr(parent, name, base)

    def bytes(self) -> int:
        """Return the size of the adapters' matrices."""
        return tensor_bytes(*self.parameters.values())

    def state(self) -> dict[str, Tensor]:
        """Return the adapters' matrices."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore stored matrices, which need no edits."""
        del portions
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
