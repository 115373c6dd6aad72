"""GRACE: a codebook in the place of one matrix' output (Hartvigsen et al. 2023, "Aging with GRACE").

At one layer every edit is an entry: a *key*, the input of the value matrix at the prompt's last token, a *value*, and a
*deferral radius*. A prompt whose last token falls within the radius of its nearest key gets that key's value in the
place of what the matrix gives; any other prompt passes as it is. The value replaces the output at the prompt's last
token alone (the authors' ``replace_last``): later tokens see it through the layers above.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.bench.methods.base import Bench, Method, PromptEnd, method, seeded, tensor_bytes
from wisecli.bench.methods.weights.weight_editing import encode_row
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import Row, collate, in_batches
from wisecli.models.running.activations import Activations, captured
from wisecli.models.running.hooks import hooked
from wisecli.models.running.upper_layers import upper_logits

Target = tuple[int, ...]


@dataclass(frozen=True)
class GraceSettings:
    """The authors' settings for decoder models (their grace.yaml, and EasyEdit's for Llama-7B).

    ``depth``: layer 27 of 32. ``radius``: ``eps`` there, Euclidean. ``rate``, ``steps``: of Adam, on values that start
    uniform in [0, 1) (``cold``). ``stop``: mean loss of a target at which its value is good (``early_stop``).
    """

    depth: float = 27 / 32
    radius: float = 1.0
    rate: float = 1.0
    steps: int = 100
    stop: float = 0.01


# A split makes the older radius smaller by this: no point lies in both.
_APART = 1e-5


class Codebook:
    """Keys (n, d_ff), values (n, d) and radii (n,) in float32, and the target that each value was learnt for."""

    def __init__(self, d_ff: int, d: int, radius: float, device: torch.device, seed: int) -> None:
        self.keys = torch.zeros(0, d_ff, device=device)
        self.values = torch.zeros(0, d, device=device)
        self.radii = torch.zeros(0, device=device)
        self.targets: list[Target] = []
        self._radius, self._generator = radius, seeded(seed)

    def state(self) -> dict[str, Tensor]:
        """Return entries with their targets, one after the other, and where the draw of new values is."""
        return {
            "keys": self.keys,
            "values": self.values,
            "radii": self.radii,
            "targets": torch.tensor([token for target in self.targets for token in target], dtype=torch.long),
            "lengths": torch.tensor([len(target) for target in self.targets], dtype=torch.long),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a stored state."""
        self.keys, self.values = state["keys"].to(self.keys), state["values"].to(self.values)
        self.radii = state["radii"].to(self.radii)
        parts = state["targets"].split(state["lengths"].tolist())
        self.targets = [tuple(part.tolist()) for part in parts]
        self._generator.set_state(state["generator"])

    def nearest(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance to the nearest key, and its index: (B, d_ff) → (B,) twice."""
        # The distance by a matrix product is not exact, and a key must lie at distance 0 from itself.
        found = torch.cdist(keys.float(), self.keys, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
        return found.values, found.indices

    def lookup(self, keys: Tensor) -> Tensor:
        """Return the entry that answers each key, or -1: (B, d_ff) → (B,)."""
        distance, entry = self.nearest(keys)
        return entry.where(distance <= self.radii[entry], -1)

    def insert(self, key: Tensor, target: Target) -> int:
        """Take a key (d_ff,) in by the paper's rules (section 3.2); the entry whose value is then to be learnt."""
        key = key.float()
        if not self.targets:
            return self._add(key, target, self._radius)
        distances, entries = self.nearest(key[None])
        distance, entry = float(distances), int(entries)
        if distance > self._radius + float(self.radii[entry]):
            return self._add(key, target, self._radius)
        if target == self.targets[entry]:
            self.radii[entry] = max(float(self.radii[entry]), distance)
            return entry
        if distance == 0:
            # Two radii of nothing at one place would keep the older fact for ever.
            self.targets[entry], self.values[entry] = target, self._cold()
            return entry
        self.radii[entry] = max(distance / 2 - _APART, 0.0)
        return self._add(key, target, distance / 2)

    def _add(self, key: Tensor, target: Target, radius: float) -> int:
        self.keys = torch.cat([self.keys, key[None]])
        self.values = torch.cat([self.values, self._cold()[None]])
        self.radii = torch.cat([self.radii, self.radii.new_tensor([radius])])
        self.targets.append(target)
        return len(self.targets) - 1

    def _cold(self) -> Tensor:
        return torch.rand(self.values.shape[1], generator=self._generator).to(self.values)


@method("grace")
class Grace(Method):
    """Edits as entries of a codebook at one layer; prompts outside all radii are answered by the model as it is."""

    def __init__(self, bench: Bench, settings: GraceSettings | None = None) -> None:
        self.bench, self.settings = bench, settings or GraceSettings()
        self.site = bench.site(max(0, min(round(self.settings.depth * bench.layers), bench.layers - 2)))
        self.portion, device = bench.batch_size, bench.loaded.device
        self.codebook = Codebook(self.site.d_ff, self.site.d, self.settings.radius, device, bench.seed)

    def edit(self, edits: Sequence[Edit]) -> None:
        """Write more edits, one after the other.

        What lies below the layer is frozen, and entries share nothing, so the values of a batch are learnt together.

        Raises:
            UnsuitableError: the tokenizer leaves nothing of an edit.
        """
        for first in range(0, len(edits), self.bench.batch_size):
            part = edits[first : first + self.bench.batch_size]
            self._take_in([encode_row(self.bench, edit.prompt, edit) for edit in part])

    def _take_in(self, rows: Sequence[Row]) -> None:
        """Give each row's key an entry of the codebook, then train entries on the rows they still belong to."""
        loaded, groups = self.bench.loaded, list(in_batches(rows, self.bench.batch_size, by_target=True))
        batches = (collate([rows[index] for index in indices]).to(loaded.device) for indices in groups)
        parts = list(captured(loaded.model, self.site, batches, stream=loaded.stream, window=True))
        keys = {
            index: key
            for indices, part in zip(groups, parts, strict=True)
            for index, key in zip(indices, part.keys[:, 0], strict=True)
        }
        entries = [self.codebook.insert(keys[index], row.target) for index, row in enumerate(rows)]
        for indices, part in zip(groups, parts, strict=True):
            # A later edit may have taken an entry over; what it was to hold before is then no more.
            held = [self.codebook.targets[entries[index]] == rows[index].target for index in indices]
            kept = [row for row, holds in enumerate(held) if holds]
            if kept:
                written = torch.tensor([entries[indices[row]] for row in kept], device=loaded.device)
                self._learn(part.rows(torch.tensor(kept, device=loaded.device)), written)

    def _learn(self, part: Activations, entries: Tensor) -> None:
        """Fit the values of some entries by gradient steps through the layers above, keeping the best values.

        Args:
            entries: which entry each row is of (B,).
        """
        settings = self.settings
        chosen, entry_of_row = entries.unique(return_inverse=True)
        values = self.codebook.values[chosen].clone().requires_grad_()
        optimizer = torch.optim.Adam([values], lr=settings.rate)
        output = self.site.watched(self.bench.loaded.model)(part.keys[:, 0]).float()
        best, lowest = values.detach().clone(), values.new_full((len(chosen),), torch.inf).detach()
        for step in range(settings.steps + 1):
            losses = self.losses(part, output, values[entry_of_row])
            worst = lowest.new_zeros(len(chosen)).scatter_reduce(0, entry_of_row, losses.detach(), "amax")
            better = worst < lowest
            best, lowest = values.detach().where(better[:, None], best), worst.where(better, lowest)
            if step == settings.steps or bool((lowest < settings.stop).all()):
                break
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
        self.codebook.values[chosen] = best

    def losses(self, part: Activations, output: Tensor, values: Tensor) -> Tensor:
        """Return the mean cross-entropy (B,) of each row's target once its value (B, d) replaces what the matrix gives.

        Args:
            output: what the matrix gives at the prompts' last token (B, d), in float32.
        """
        update = F.pad((values - output)[:, None], (0, 0, 0, part.hidden.shape[1] - 1))
        rows, hidden = part.batch.labelled[0], part.with_update(update)
        logits = upper_logits(self.bench.loaded.model, self.site, part, hidden, part.batch.labelled)
        entropy = F.cross_entropy(logits.float(), part.batch.targets, reduction="none")
        totals = entropy.new_zeros(len(values)).index_add(0, rows, entropy)
        return totals / torch.bincount(rows, minlength=len(values))

    def applied(self, first: int | None = None) -> AbstractContextManager[object]:
        """Return the model with the codebook at its layer; each row is looked up once, at its prompt's last token."""
        model, module, end = self.bench.loaded.model, self.site.watched(self.bench.loaded.model), PromptEnd(first)

        def replace(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            looked_up = []

            def decide(keys: Tensor) -> Tensor:
                looked_up.append(True)
                return self.codebook.lookup(keys)

            entries, column = end.held_decision(inputs[0], decide)
            hit = (entries >= 0).nonzero().flatten()
            if not looked_up or not len(hit):  # tokens of an answer keep what the matrix gives
                return output
            output = output.clone()
            output[hit, column] = self.codebook.values[entries[hit]].to(output.dtype)
            return output

        if not self.codebook.targets:
            return hooked()
        return hooked(end.follow_passes(model), module.register_forward_hook(replace))

    def bytes(self) -> int:
        """Return the size of keys, values and radii."""
        return tensor_bytes(self.codebook.keys, self.codebook.values, self.codebook.radii)

    def state(self) -> dict[str, Tensor]:
        """Return the codebook's."""
        return self.codebook.state()

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore a stored codebook, which needs no edits."""
        del portions
        self.codebook.restore(state)
