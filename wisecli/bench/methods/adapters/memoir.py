"""MEMOIR: a residual memory of which each edit writes some columns only (Wang et al. 2025, arXiv 2506.07899).

Beside one value matrix W stands a memory W_m of its shape, zero at first. A prompt's features are the mean key of its
tokens less that of unrelated texts. TopHash takes the largest of them in size and sends these through a fixed random
permutation, which gives the mask M of the prompt, the same number of columns for each. With it the matrix gives

    W k + W_m (M ∘ k)

for every token's key k, so that gradient steps on an edit change the columns of its mask alone. The edits' masks are
kept. A prompt is answered under the one that shares most columns with its own, if that is a large enough share of them;
otherwise the memory stays shut.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wisecli.bench.methods.base import (
    Bench,
    EditByEdit,
    PromptEnd,
    method,
    require_finite,
    require_texts,
    seeded,
    tensor_bytes,
)
from wisecli.bench.methods.weights.gradient_factors import row_losses
from wisecli.bench.methods.weights.rome_common import prefixes_for
from wisecli.bench.methods.weights.weight_editing import at_depth, encode_row
from wisecli.editing.background.key_capture import keys_of_texts
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import collate
from wisecli.models.running.activations import Activations, captured
from wisecli.models.running.hooks import hooked
from wisecli.models.running.upper_layers import upper_logits


@dataclass(frozen=True)
class MemoirSettings:
    """The authors' for Llama-3-8B and zsRE (their llama3-8b.yaml), in parts of depth and width.

    ``layer`` of ``of`` is a depth, ``share`` the part of the columns in a mask (4,096 of 14,336), ``threshold`` the
    share of a mask that opens the memory. ``rate``, ``steps``, ``limit``: gradient descent with gradients of this norm
    at most; it ends when a loss below ``stop`` moves no more than ``still``. Rate and limit are for ``width`` columns:
    of fewer the keys are shorter, and a step as long would move what the matrix gives less. An edit is learnt as it
    stands and after ``prefixes`` texts. ``background`` texts give the mean features.
    """

    layer: int = 27
    of: int = 32
    share: float = 2 / 7
    threshold: float = 0.4
    rate: float = 1.0
    steps: int = 30
    limit: float = 1.0
    width: int = 14336
    stop: float = 0.02
    still: float = 1e-4
    prefixes: int = 10
    prefix_tokens: int = 10
    background: int = 100


class TopHash:
    """From features (d_ff,) to a mask (d_ff,): a random permutation of the ``count`` largest in size."""

    def __init__(self, width: int, count: int, seed: int) -> None:
        self.count = count
        self.permutation = torch.randperm(width, generator=seeded(seed))

    def mask(self, features: Tensor) -> Tensor:
        """Return which columns the features choose; rows (B, d_ff) each for itself."""
        largest = features.abs().topk(self.count, -1).indices
        columns = self.permutation.to(largest.device)[largest]
        return torch.zeros_like(features, dtype=torch.bool).scatter(-1, columns, torch.ones_like(columns).bool())


@method("memoir")
class Memoir(EditByEdit):
    """Edits in a memory beside one matrix; where no edit's mask is like a prompt's, the model answers as it is.

    ``memory`` (d, d_ff) in float32, ``masks`` (n, d_ff) of the edits, those that are the same once.

    Raises:
        UnsuitableError: there are no unrelated texts.
    """

    stage = "residual memory"

    def __init__(self, bench: Bench, settings: MemoirSettings | None = None) -> None:
        self.bench, self.settings = bench, settings or MemoirSettings()
        self.site = at_depth(bench, self.settings.layer, self.settings.of)
        device, width = bench.loaded.device, self.site.d_ff
        self.hash = TopHash(width, max(1, round(self.settings.share * width)), bench.seed)
        self.memory = torch.zeros(self.site.d, width, device=device)
        self.masks = torch.zeros(0, width, dtype=torch.bool, device=device)
        self.background = self._background()
        self.prefixes = prefixes_for(bench, self.settings.prefixes, self.settings.prefix_tokens)

    def _background(self) -> Tensor:
        """Return the mean features (d_ff,) of unrelated texts, each of which counts alike."""
        texts = require_texts(self.bench.texts[: self.settings.background])
        size, on_progress = self.bench.batch_size, self.bench.on_progress
        keys, text, *_ = keys_of_texts(self.bench.loaded, self.site, texts, batch_size=size, on_progress=on_progress)
        sums = keys.new_zeros(len(texts), keys.shape[1]).index_add(0, text, keys)
        counts = torch.bincount(text, minlength=len(texts))
        return (sums / counts.clamp(min=1)[:, None])[counts > 0].mean(0)

    def features(self, keys: Tensor, prompt: Tensor) -> Tensor:
        """Return features (B, d_ff) of prompts from keys (B, T, d_ff) and the prompts' tokens among them (B, T)."""
        sums = keys.float().masked_fill(~prompt[..., None], 0).sum(1)
        return sums / prompt.sum(-1, keepdim=True) - self.background

    def learn(self, edit: Edit) -> None:
        """Write one edit into the columns of its mask."""
        loaded = self.bench.loaded
        batch = collate([encode_row(self.bench, prefix + edit.prompt, edit) for prefix in self.prefixes])
        (part,) = captured(loaded.model, self.site, [batch.to(loaded.device)], stream=loaded.stream)
        # The prompt alone, which is the first row, says where all of them write.
        mask = self.hash.mask(self.features(part.keys[:1], prompts(part.keys, part.batch.mask, part.batch.start)[:1]))
        self._descend(edit, part, mask[0].nonzero().flatten())
        if not (self.masks == mask).all(-1).any():
            self.masks = torch.cat([self.masks, mask])

    def _descend(self, edit: Edit, part: Activations, columns: Tensor) -> None:
        """Fit the memory's columns of one edit by clipped gradient steps, until the loss is low and no longer moves."""
        settings, before = self.settings, float("inf")
        # The squared length of keys grows with their number, and with it what a step of a gradient's own length moves.
        narrower = settings.width / self.site.d_ff
        rate, limit = settings.rate * narrower, settings.limit / narrower**0.5
        keys, values = part.keys[..., columns].float(), self.memory[:, columns].requires_grad_()
        for _ in range(settings.steps):
            loss = self.loss(part, keys, values)
            require_finite(loss, f"edit {edit.id!r}")
            now = float(loss.detach())
            if now <= settings.stop and abs(now - before) <= settings.still:
                break
            before = now
            (gradient,) = torch.autograd.grad(loss, values)
            values.data -= rate * gradient * (limit / gradient.norm().clamp(min=1e-12)).clamp(max=1.0)
        self.memory[:, columns] = values.detach()

    def loss(self, part: Activations, keys: Tensor, values: Tensor) -> Tensor:
        """Return the mean cross-entropy of the target's tokens with the memory open, each row counting alike.

        Args:
            keys: the mask's columns of the part's keys (B, T, k).
            values: those of the memory (d, k).
        """
        with torch.enable_grad():
            hidden = part.with_update(keys @ values.T)
            logits = upper_logits(self.bench.loaded.model, self.site, part, hidden, part.batch.labelled)
            return row_losses(logits.float(), part.batch).mean()

    def nearest(self, masks: Tensor) -> Tensor:
        """Return the edit (B,) whose mask shares most columns with each mask (B, d_ff), -1 where that is too few."""
        shares, edits = (masks.float() @ self.masks.float().T / self.hash.count).max(-1)
        return edits.where(shares >= self.settings.threshold, -1)

    def applied(self, first: int | None = None) -> AbstractContextManager[object]:
        """Return the model with the memory beside its matrix; each row's mask is chosen once, by its whole prompt."""
        if not len(self.masks):
            return hooked()
        model, module, end = self.bench.loaded.model, self.site.watched(self.bench.loaded.model), PromptEnd(first)

        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            keys = inputs[0]

            def decide(_last: Tensor) -> Tensor:
                return self.nearest(self.hash.mask(self.features(keys, prompts(keys, end.mask, first))))

            edits, _ = end.held_decision(keys, decide)
            opened = (edits >= 0).nonzero().flatten()
            if not len(opened):
                return output
            masked = keys[opened].float() * self.masks[edits[opened], None]
            output = output.clone()
            output[opened] += (masked @ self.memory.T).to(output.dtype)
            return output

        return hooked(end.follow_passes(model), module.register_forward_hook(add))

    def bytes(self) -> int:
        """Return the size of memory, masks, permutation and mean features."""
        return tensor_bytes(self.memory, self.masks, self.hash.permutation, self.background)

    def state(self) -> dict[str, Tensor]:
        """Return the memory, and the edits' masks."""
        return {"memory": self.memory, "masks": self.masks}

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore a stored memory and masks, which need no edits."""
        del portions
        self.memory, self.masks = state["memory"].to(self.memory), state["masks"].to(self.masks)


def prompts(keys: Tensor, mask: Tensor | None, first: int | None) -> Tensor:
    """Return where the prompts' tokens are (B, T): no padding, and nothing after the column ``first``, if there is
    one.

    Args:
        keys: (B, T, d_ff).
        mask: what the model was told of padding.
    """
    real = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device) if mask is None else mask.bool().clone()
    if first is not None:
        real[:, first + 1 :] = False
    return real
