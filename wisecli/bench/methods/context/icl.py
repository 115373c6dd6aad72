"""In-context editing (IKE; Zheng et al. 2023, "Can We Edit Factual Knowledge by In-Context Learning?").

The prompt comes after the new fact, and both after demonstrations of what to do with new facts, made from records of
the train split: to *copy* one, to *update* what is asked in other words, and to *retain* what the fact says nothing of.
The paper gives the fact of the edit that is being measured. A stream has many, so here it is the stored edit nearest to
the prompt, however far that is: what keeps other answers as they are is the demonstrations alone. A prompt that waits
for its answer after a colon has its demonstrations worded like it.
"""

from dataclasses import dataclass

from wisecli.bench.methods.base import Bench, UnsuitableError, method
from wisecli.bench.methods.context.retrieval import Facts, ReplayedMethod, TermIndex, demonstration, instruction_prompt


@dataclass(frozen=True)
class IclSettings:
    """What demonstrations there are.

    ``count``: half of the paper's 32, for contexts of small models. ``kinds``: 1 copy, 3 update and 4 retain of eight,
    as in the paper (section 3.2), from the one nearest to the prompt on. ``share`` of the context they may fill.
    """

    count: int = 16
    kinds: tuple[str, ...] = ("retain", "update", "retain", "update", "retain", "update", "retain", "copy")
    share: float = 0.5


@method("icl")
class Icl(ReplayedMethod):
    """Edits as texts, told with demonstrations.

    Raises:
        UnsuitableError: there are no records to demonstrate with.
    """

    def __init__(self, bench: Bench, settings: IclSettings | None = None) -> None:
        if not bench.train:
            raise UnsuitableError("icl needs records of the train split, its demonstrations; there are none")
        self.settings, self._tokenizer = settings or IclSettings(), bench.loaded.tokenizer
        self._records = Facts(TermIndex(self._tokenizer, bench.background))
        self._records.add(bench.train)
        self.facts = Facts(TermIndex(self._tokenizer, bench.background))
        positions = getattr(bench.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        self._room = self.settings.share * positions if positions else float("inf")

    def rewritten_prompt(self, prompt: str) -> str:
        """Return demonstrations, the most similar last, then the nearest edit as a new fact, and the prompt."""
        nearest = self.facts.ranked(prompt, 1)
        if not nearest:
            return prompt
        text = instruction_prompt(nearest[0][0], prompt)
        room = self._room - self._length(text)
        kinds = self.settings.kinds
        for rank, (record, _) in enumerate(self._records.ranked(prompt, self.settings.count)):
            example = demonstration(record, kinds[rank % len(kinds)], prompt)
            room -= self._length(example)
            if room < 0:
                break
            text = example + text
        return text

    def _length(self, text: str) -> int:
        return len(self._tokenizer(text)["input_ids"])

    def bytes(self) -> int:
        """Return the size of stored edits, records and their indices."""
        return self.facts.bytes() + self._records.bytes()
