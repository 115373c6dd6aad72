"""Retrieval: the nearest stored edit is put before the prompt, if it is similar enough.

Similarity is the cosine of TF-IDF bags of tokens, without another model. The threshold is fitted on the train split.
"""

from wisecli.bench.methods.base import Bench, method
from wisecli.bench.methods.context.retrieval import NearestFact, TermIndex


@method("rag")
class Rag(NearestFact):
    """Edits as texts that are looked up by the words of the prompt."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, lambda: TermIndex(bench.loaded.tokenizer, bench.background), "rag")
