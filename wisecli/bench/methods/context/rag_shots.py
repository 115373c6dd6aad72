"""Retrieval with demonstrations: before the fact that is found stand a few records, each with how it is used.

The demonstrations are the same for every prompt, so that an engine with a prefix cache reads them once. A prompt for
which nothing is found stands alone, as with :mod:`wisecli.bench.methods.context.rag`, whose index and threshold these
are.
"""

from wisecli.bench.methods.base import Bench, method
from wisecli.bench.methods.context.retrieval import NearestFact, TermIndex, demonstration


@method("rag-shots")
class RagShots(NearestFact):
    """Edits as texts that are looked up by the words of the prompt, and told with demonstrations.

    Args:
        count: of demonstrations; each asks a record in other words. Of 1, 2 and 4 two gave the most right answers under
            WILD, on fifty records of zsRE (``benchmarks/rivals.py``).
        first: place of the first of them among the records that may be learnt from.
    """

    def __init__(self, bench: Bench, count: int = 2, first: int = 0) -> None:
        super().__init__(bench, lambda: TermIndex(bench.loaded.tokenizer, bench.background), "rag-shots")
        self._records = bench.train[first : first + count]

    def rewritten_prompt(self, prompt: str) -> str:
        """Return the prompt, after demonstrations and the nearest edit if that is similar enough."""
        text = super().rewritten_prompt(prompt)
        if text == prompt:
            return prompt
        return "".join(demonstration(record, "update", prompt) for record in self._records) + text
