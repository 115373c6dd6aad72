"""SERAC: edits stay texts in a memory (Mitchell et al. 2022, "Memory-Based Model Editing at Scale").

A *scope classifier* says whether a prompt asks for a stored edit, and for which. If so, a *counterfactual model*
answers with that edit in its context, else the model itself. The paper trains both as small models of their own. Here
neither is trained: the classifier is the cosine of the model's own embeddings, with a threshold fitted on the train
split, and the counterfactual model is the same base model. Only the prompt is looked at, so a decision holds for a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.bench.methods.base import Bench, method, tensor_bytes
from wisecli.bench.methods.context.retrieval import NearestFact
from wisecli.models.prompts.tokenization import Row, in_batches
from wisecli.models.running.generation import left_padded
from wisecli.models.running.hooks import hooked


class StateIndex:
    """Texts by the mean of the model's last hidden states, less what all texts have in common.

    Args:
        background: texts whose mean is taken off: it is most of every state, and would make all cosines large.
    """

    def __init__(self, embedder: Embedder, background: Sequence[str]) -> None:
        self._embedder = embedder
        self._middle = embedder.means(background).mean(0)
        self._units = self._middle.new_zeros(0, len(self._middle))

    def _centred(self, means: Tensor) -> Tensor:
        return F.normalize(means - self._middle, dim=-1)

    def add(self, texts: Sequence[str]) -> None:
        """Add texts."""
        if texts:
            self._units = torch.cat([self._units, self._centred(self._embedder.means(texts))])

    def scores(self, text: str) -> Tensor:
        """Return the cosine with each text (n,)."""
        return (self._units @ self._centred(self._embedder.read([text]))[0]).cpu()

    def bytes(self) -> int:
        """Return the size of the embeddings."""
        return tensor_bytes(self._units, self._middle)


class Embedder:
    """The mean of the model's last hidden states over a text."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._known: dict[str, Tensor] = {}

    def means(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings (n, d) in float32 of texts; each text is read once and its embedding kept."""
        if new := list(dict.fromkeys(text for text in texts if text not in self._known)):
            self._known |= dict(zip(new, self.read(new), strict=True))
        return torch.stack([self._known[text] for text in texts])

    def read(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings (n, d) in float32 of texts, which are all read."""
        encoded = [tuple(self._bench.loaded.tokenizer(text)["input_ids"]) for text in texts]
        found: dict[int, Tensor] = {}
        for indices in in_batches([Row(tokens, ()) for tokens in encoded], self._bench.batch_size):
            found |= dict(zip(indices, self._read([encoded[index] for index in indices]), strict=True))
        return torch.stack([found[index] for index in range(len(texts))])

    @torch.no_grad()
    def _read(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the mean final state of each row's tokens (n, d), in float32."""
        model = self._bench.loaded.model
        ids, mask = (part.to(model.device) for part in left_padded(rows))
        kept: list[Tensor] = []

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            kept.append(inputs[0].float())
            return inputs[0][:, :0]  # the head has nothing to do

        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with hooked(model.get_output_embeddings().register_forward_pre_hook(keep)):
            model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        total = kept[0].where(mask[..., None].bool(), 0.0).sum(1)  # padding may be anything
        return total / mask.sum(-1, keepdim=True)


@method("serac")
class Serac(NearestFact):
    """Edits as texts that are looked up by the model's own embedding of the prompt."""

    def __init__(self, bench: Bench) -> None:
        embedder = Embedder(bench)
        super().__init__(bench, lambda: StateIndex(embedder, bench.background), "serac")
