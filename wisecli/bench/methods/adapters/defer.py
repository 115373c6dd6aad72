"""DEFER: a gate and a linear layer beside one matrix, both learnt as edits come (Hartvigsen et al. 2023, section 4.1).

The rival of that paper that stands for SERAC where edits come one by one: a *scope classifier* g says whether a prompt
is deferred to a *counterfactual model* v. Both are linear in the prompt's key k, the matrix' input at its last token:

    g = σ(w · k + b),    v = U k + c,    y' = g v + (1 - g) y  while an edit is learnt, and then  v if g ≥ 1/2 else y

y is what the matrix gives. A prompt has one g and one v, which hold from its last token on through its answer. Each
edit trains w, b, U and c on its own target alone: nothing keeps earlier edits, and nothing keeps the gate shut.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.bench.methods.base import Bench, EditByEdit, PromptEnd, method, require_finite, seeded, tensor_bytes
from wisecli.bench.methods.weights.weight_editing import at_depth, encode_row
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import collate
from wisecli.models.running.activations import Activations, captured
from wisecli.models.running.hooks import hooked
from wisecli.models.running.upper_layers import upper_logits


@dataclass(frozen=True)
class DeferSettings:
    """``layer`` of ``of`` is a depth, the same as for GRACE; ``rate`` and ``steps`` are of Adam, begun anew each edit.

    The authors' are .1 and 100 (their defer.yaml), for a T5 with 60 million parameters. At .1 and .01 next to nothing
    is left here of ten edits in a row, so ``rate`` is one at which most is (.1, .01, .003, .001 and .0003 were tried,
    with SmolLM2-135M and records of zsRE's train split; .0003 does as well).
    """

    layer: int = 27
    of: int = 32
    rate: float = 1e-3
    steps: int = 100


@method("defer")
class Defer(EditByEdit):
    """One gate and one linear layer for all edits; prompts that the gate lets pass are answered by the model as it is.

    ``weight`` (1 + d, d_ff) and ``bias`` (1 + d,) hold w and b in their first row, U and c in the others, in float32.
    """

    stage = "deferrals"

    def __init__(self, bench: Bench, settings: DeferSettings | None = None) -> None:
        self.bench, self.settings = bench, settings or DeferSettings()
        self.site = at_depth(bench, self.settings.layer, self.settings.of)
        bound, generator = self.site.d_ff**-0.5, seeded(bench.seed)
        # As torch's own linear layers begin.
        shapes = (1 + self.site.d, self.site.d_ff), (1 + self.site.d,)
        drawn = (bound * (2 * torch.rand(shape, generator=generator) - 1) for shape in shapes)
        self.weight, self.bias = (part.to(bench.loaded.device) for part in drawn)
        self.trained = False

    def learn(self, edit: Edit) -> None:
        """Train gate and layer on one edit."""
        loaded = self.bench.loaded
        batch = collate([encode_row(self.bench, edit.prompt, edit)]).to(loaded.device)
        (part,) = captured(loaded.model, self.site, [batch], stream=loaded.stream, window=True)
        trained = [self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()]
        optimizer = torch.optim.Adam(trained, lr=self.settings.rate)
        output = self.site.watched(loaded.model)(part.keys).float()
        for _ in range(self.settings.steps):
            loss = self.loss(part, output, *trained)
            require_finite(loss, f"edit {edit.id!r}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.weight, self.bias = (tensor.detach() for tensor in trained)
        self.trained = True

    def loss(self, part: Activations, output: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the mean cross-entropy of the target's tokens with ``g v + (1 - g) y`` in the place of the output y.

        Args:
            part: captured from the prompts' last token on.
            output: what the matrix gives for the part's keys (B, T - first, d), in float32.
        """
        scope, values = split(F.linear(part.keys[:, 0].float(), weight, bias))
        hidden = part.with_update(scope.sigmoid()[:, None, None] * (values[:, None] - output))
        logits = upper_logits(self.bench.loaded.model, self.site, part, hidden, part.batch.labelled)
        return F.cross_entropy(logits.float(), part.batch.targets)

    def applied(self, first: int | None = None) -> AbstractContextManager[object]:
        """Return the model with the gate at its layer; each row is decided once, at its prompt's last token."""
        model, module, end = self.bench.loaded.model, self.site.watched(self.bench.loaded.model), PromptEnd(first)

        def replace(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            decided, column = end.held_decision(inputs[0], lambda keys: F.linear(keys.float(), self.weight, self.bias))
            scope, values = split(decided)
            deferred = (scope >= 0).nonzero().flatten()
            if not len(deferred):
                return output
            output = output.clone()
            output[deferred, column:] = values[deferred, None].to(output.dtype)
            return output

        if not self.trained:
            return hooked()
        return hooked(end.follow_passes(model), module.register_forward_hook(replace))

    def bytes(self) -> int:
        """Return the size of gate and layer."""
        return tensor_bytes(self.weight, self.bias)

    def state(self) -> dict[str, Tensor]:
        """Return gate and layer."""
        return {"weight": self.weight, "bias": self.bias}

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore a stored gate and layer."""
        self.weight, self.bias = state["weight"].to(self.weight), state["bias"].to(self.bias)
        self.trained = bool(portions)


def split(found: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gate's logit (B,) and the value (B, d) out of (B, 1 + d)."""
    return found[:, 0], found[:, 1:]
