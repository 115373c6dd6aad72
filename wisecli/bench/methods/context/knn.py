"""A memory of next tokens: kNN-LM (Khandelwal et al. 2020), as SPALM keeps one beside its model (Yogatama et al. 2021).

Every target token of an edit is stored under the hidden state that predicts it, ``p = λ p_kNN + (1 - λ) p_LM``, and
``p_kNN`` is a softmax over the nearest states' negative squared distances. The hidden state is what the head reads
(the paper takes the input of the last feed-forward layer). ``λ`` is one number (SPALM learns a gate), and like the
distances' temperature it is chosen on a validation set, as in the paper (its section 3): records of the train split.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wisecli.bench.methods.base import Bench, Method, method, tensor_bytes
from wisecli.bench.methods.weights.weight_editing import encode_row
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import Row, collate, encode, in_batches
from wisecli.models.running.forward_pass import run_model
from wisecli.models.running.hooks import hooked


@dataclass(frozen=True)
class KnnSettings:
    """``neighbours`` as in the paper. ``share`` (λ) and ``temperature`` stand where there is nothing to choose them on.

    ``shares``, ``temperatures``: what is tried on ``records`` of the train split; temperatures in units of the mean
    squared distance between stored states.
    """

    neighbours: int = 1024
    share: float = 0.25
    temperature: float = 1.0
    shares: tuple[float, ...] = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
    temperatures: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    records: int = 32


# So many stored states are compared at a time.
_CHUNK = 8192


class Datastore:
    """Hidden states (n, d) in float32, and the token that comes after each (n,)."""

    def __init__(self, d: int, device: torch.device) -> None:
        self.keys = torch.zeros(0, d, device=device)
        self.tokens = torch.zeros(0, dtype=torch.long, device=device)

    def add(self, keys: Tensor, tokens: Tensor) -> None:
        """Store more states."""
        self.keys, self.tokens = torch.cat([self.keys, keys]), torch.cat([self.tokens, tokens])

    def nearest(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return squared distances and tokens of the nearest states, by exact search: (m, d) → (m, k) twice."""
        best, tokens = queries.new_zeros(len(queries), 0), self.tokens.new_zeros(len(queries), 0)
        for keys, after in zip(self.keys.split(_CHUNK), self.tokens.split(_CHUNK), strict=True):
            found = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
            best, tokens = torch.cat([best, found], -1), torch.cat([tokens, after.expand(len(queries), -1)], -1)
            best, order = best.topk(min(count, best.shape[1]), largest=False)
            tokens = tokens.gather(-1, order)
        return best, tokens


def neighbourhood(distances: Tensor, tokens: Tensor, temperature: float, vocabulary: int) -> Tensor:
    """Return ``p_kNN`` from squared distances and tokens (m, k): (m, V)."""
    weights = (-distances / temperature).softmax(-1)
    return weights.new_zeros(len(weights), vocabulary).scatter_add(-1, tokens, weights)


@dataclass(frozen=True)
class _Read:
    """What the model makes of one row's target: states (n, d), logits (n, V), and the tokens themselves (n,)."""

    states: Tensor
    logits: Tensor
    tokens: Tensor


@method("knn")
class Knn(Method):
    """Edits as states with the tokens after them; every token is predicted from the nearest of these states, too."""

    def __init__(self, bench: Bench, settings: KnnSettings | None = None) -> None:
        self.bench, self.settings = bench, settings or KnnSettings()
        self.portion = bench.batch_size
        self.store = self._empty()
        self.share, self.temperature = self._chosen()

    def _empty(self) -> Datastore:
        weight = self.bench.loaded.model.get_output_embeddings().get_parameter("weight")
        return Datastore(weight.shape[1], self.bench.loaded.device)

    def edit(self, edits: Sequence[Edit]) -> None:
        """Store the targets of more edits.

        Raises:
            UnsuitableError: the tokenizer leaves nothing of an edit.
        """
        for read in self._read([encode_row(self.bench, edit.prompt, edit) for edit in edits]):
            self.store.add(read.states, read.tokens)

    @torch.no_grad()
    def _read(self, rows: Sequence[Row]) -> list[_Read]:
        """Return what the unedited model makes of prompts and their answers."""
        found = dict[int, _Read]()
        for indices in in_batches(rows, self.bench.batch_size):
            for index, read in zip(indices, self._read_batch([rows[index] for index in indices]), strict=True):
                found[index] = read
        return [found[index] for index in range(len(rows))]

    def _read_batch(self, rows: Sequence[Row]) -> list[_Read]:
        """Return the final states, logits and target tokens of each row, from one forward pass."""
        loaded, kept = self.bench.loaded, []
        batch = collate(rows).to(loaded.device)

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept.append(inputs[0][batch.labelled])

        with hooked(loaded.model.get_output_embeddings().register_forward_pre_hook(keep)):
            logits = run_model(loaded.model, batch, batch.labelled)
        lengths = [len(row.target) for row in rows]
        parts = (part.split(lengths) for part in (kept[0].float(), logits, batch.targets))
        return [_Read(*fields) for fields in zip(*parts, strict=True)]

    def _chosen(self) -> tuple[float, float]:
        """Return λ and the temperature that do best on records of the train split.

        Their prompts and rephrases should get their targets, their locality prompts what the model says unedited; all
        three count alike.
        """
        records = list(self.bench.train)[: self.settings.records]
        if not records:
            return self.settings.share, self.settings.temperature
        tokenizer = self.bench.loaded.tokenizer
        prompts = self._read([encode(tokenizer, edit.prompt, edit.target) for edit in records])
        reworded = self._read([encode(tokenizer, text, edit.target) for edit in records for text in edit.rephrases[:1]])
        probes = [probe for edit in records for probe in edit.locality[:1]]
        locality = self._read([encode(tokenizer, probe.prompt, probe.answer) for probe in probes])
        wanted = [(read, read.tokens) for read in (*prompts, *reworded)]
        wanted += [(read, read.logits.argmax(-1)) for read in locality]
        kinds = torch.tensor([0] * len(prompts) + [1] * len(reworded) + [2] * len(locality))
        store = self._empty()
        for read in prompts:
            store.add(read.states, read.tokens)
        unit = max(float(torch.cdist(store.keys, store.keys).square().mean()), 1e-6)
        hits: dict[tuple[float, float], list[float]] = {}
        for read, tokens in wanted:
            nearest, alone = store.nearest(read.states, self.settings.neighbours), read.logits.float().softmax(-1)
            for temperature in (unit * part for part in self.settings.temperatures):
                near = neighbourhood(*nearest, temperature, alone.shape[-1])
                for share in self.settings.shares:
                    best = torch.lerp(alone, near, share).argmax(-1)
                    hits.setdefault((share, temperature), []).append(float((best == tokens).float().mean()))

        def right(pair: tuple[float, float]) -> float:
            shares = torch.tensor(hits[pair])
            return float(sum(shares[kinds == kind].mean() for kind in kinds.unique()))

        return max(sorted(hits), key=right)

    def applied(self, first: int | None = None) -> AbstractContextManager[object]:  # noqa: ARG002
        """Return the model with the datastore's tokens mixed into its output; tokens do not depend on each other."""
        if not len(self.store.tokens):
            return hooked()
        model, kept = self.bench.loaded.model, dict[str, Tensor]()

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            kept["states"] = inputs[0]

        def mix(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            # Not at the head: some architectures cap or scale what that gives.
            states, logits = kept.pop("states").flatten(0, -2).float(), output.logits
            nearest, alone = self.store.nearest(states, self.settings.neighbours), logits.float().softmax(-1)
            near = neighbourhood(*nearest, self.temperature, logits.shape[-1]).view(logits.shape)
            output.logits = torch.lerp(alone, near, self.share).clamp(min=torch.finfo(near.dtype).tiny).log()
            return output

        head = model.get_output_embeddings().register_forward_hook(keep)
        return hooked(head, model.register_forward_hook(mix))

    def bytes(self) -> int:
        """Return the size of states and tokens."""
        return tensor_bytes(self.store.keys, self.store.tokens)

    def state(self) -> dict[str, Tensor]:
        """Return states, tokens, and how much they count."""
        chosen = torch.tensor([self.share, self.temperature], dtype=torch.float64)
        return {"keys": self.store.keys, "tokens": self.store.tokens, "chosen": chosen}

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore stored states and tokens, which need no edits."""
        del portions
        self.store.add(state["keys"].to(self.store.keys), state["tokens"].to(self.store.tokens))
        self.share, self.temperature = state["chosen"].tolist()
