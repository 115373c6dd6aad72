"""Retrieval by words and states together: BM25 beside the cosine of the model's own states.

    bm25(q, d) = Σ_t rarity_t · c_t (k + 1) / (c_t + k (1 - b + b |d| / mean |d|)),    c_t: how often d has t
    score      = (bm25(q, d) / bm25(d, d) + cos(x_q, x_d)) / 2

(Robertson and Zaragoza 2009; k = 1.2, b = .75), t over the different tokens of q. x is the mean of a text's states
after half of the layers, standardised over unrelated texts. No other model is loaded; the train split sets a threshold.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.bench.methods.base import Bench, method, require_texts, tensor_bytes
from wisecli.bench.methods.context.retrieval import NearestFact
from wisecli.editing.router_training.token_states import token_states
from wisecli.progress import ignore_progress

_K, _B = 1.2, 0.75


class WordsAndStates:
    """Texts, and how similar each is to another one by both.

    Args:
        background: texts that tell how rare a token is, and how states spread.

    Raises:
        UnsuitableError: there are none.
    """

    def __init__(self, bench: Bench, background: Sequence[str]) -> None:
        require_texts(background)
        self.bench, self.site = bench, bench.site(bench.layers // 2)
        self._size = len(background)
        bags = [self._bag(text) for text in background]
        self._seen = Counter(token for bag in bags for token in bag)
        self._length = sum(sum(bag.values()) for bag in bags) / len(bags)
        states = self._means(background)
        self._mean, self._spread = states.mean(0), states.std(0).clamp(min=1e-6)
        self._bags: list[Counter[int]] = []
        self._full: list[float] = []
        self._states = torch.empty(0, self.site.d)

    def add(self, texts: Sequence[str]) -> None:
        """Add texts."""
        bags = [self._bag(text) for text in texts]
        self._full += [self.words(bag, bag) for bag in bags]
        self._bags += bags
        if texts:
            self._states = torch.cat([self._states, self._directions(texts)])

    def scores(self, text: str) -> Tensor:
        """Return how similar each text is (n,)."""
        query = self._bag(text)
        shared = [self.words(query, bag) / (full or 1.0) for bag, full in zip(self._bags, self._full, strict=True)]
        return (torch.tensor(shared) + self._states @ self._directions([text])[0]) / 2

    def words(self, query: Counter[int], bag: Counter[int]) -> float:
        """Return the BM25 score of one text for another that asks."""
        long = _K * (1 - _B + _B * sum(bag.values()) / self._length)
        return sum(self._rarity(token) * bag[token] * (_K + 1) / (bag[token] + long) for token in query if token in bag)

    def bytes(self) -> int:
        """Return the size of a number and a count a token, and of the states."""
        return 8 * sum(map(len, self._bags)) + tensor_bytes(self._states)

    def _rarity(self, token: int) -> float:
        return math.log(1 + (self._size - self._seen[token] + 0.5) / (self._seen[token] + 0.5))

    def _bag(self, text: str) -> Counter[int]:
        # With a space before it the first word is the token that it is elsewhere.
        return Counter(self.bench.loaded.tokenizer(f" {text.lower()}", add_special_tokens=False)["input_ids"])

    def _means(self, texts: Sequence[str]) -> Tensor:
        """Return the mean state of each text's tokens (n, d)."""
        size = self.bench.batch_size
        found = token_states(
            self.bench.loaded, self.site, texts, batch_size=size, on_progress=ignore_progress, stage=""
        )
        counts = torch.bincount(found.text, minlength=len(texts))[:, None]
        sums = torch.zeros(len(texts), self.site.d).index_add(0, found.text, found.states.float())
        return sums / counts

    def _directions(self, texts: Sequence[str]) -> Tensor:
        return F.normalize((self._means(texts) - self._mean) / self._spread, dim=-1)


@method("rag-hybrid")
class RagHybrid(NearestFact):
    """Edits as texts that are looked up by the words of the prompt and by what the model makes of it."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, lambda: WordsAndStates(bench, bench.background), "rag-hybrid")
