"""What methods that put edits into the context share: which stored edit is nearest, and whether it is near enough."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from wisecli.bench.methods.base import Bench, Method, UnsuitableError
from wisecli.edits.record import Edit
from wisecli.models.prompts.prompt_forms import usable_forms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# So many records of the train split set a threshold: it is a rate, and more do not move it.
_CALIBRATION = 400


class Index(Protocol):
    """Texts, and how similar each is to another one."""

    def add(self, texts: Sequence[str]) -> None:
        """Add texts."""

    def scores(self, text: str) -> Tensor:
        """Return the cosine with each text in the order in which they came (n,)."""

    def bytes(self) -> int:
        """Return the size of what is kept."""


class TermIndex:
    """Bags of the tokenizer's own tokens, in lower case, rare tokens weighing more (TF-IDF).

    Args:
        background: texts that tell how rare a token is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, background: Sequence[str]) -> None:
        self._tokenizer, self._size = tokenizer, len(background)
        self._seen = Counter(token for text in background for token in set(self._tokens(text)))
        self._postings: dict[int, dict[int, float]] = {}
        self._count = 0

    def _tokens(self, text: str) -> list[int]:
        # With a space before it the first word is the token that it is elsewhere.
        return list(self._tokenizer(f" {text.lower()}", add_special_tokens=False)["input_ids"])

    def vector(self, text: str) -> dict[int, float]:
        """Return the weight of each token; together they have length 1."""
        counts = Counter(self._tokens(text))
        weights = {
            token: count * (1 + math.log((1 + self._size) / (1 + self._seen[token]))) for token, count in counts.items()
        }
        length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        return {token: weight / length for token, weight in weights.items()}

    def add(self, texts: Sequence[str]) -> None:
        """Add texts."""
        for index, text in enumerate(texts, start=self._count):
            for token, weight in self.vector(text).items():
                self._postings.setdefault(token, {})[index] = weight
        self._count += len(texts)

    def scores(self, text: str) -> Tensor:
        """Return the cosine with each text (n,)."""
        found = [0.0] * self._count
        for token, weight in self.vector(text).items():
            for index, other in self._postings.get(token, {}).items():
                found[index] += weight * other
        return torch.tensor(found)

    def bytes(self) -> int:
        """Return the size of a token's number and weight for each entry."""
        return 8 * sum(map(len, self._postings.values()))


class Facts:
    """Stored edits; of several with one prompt, the latest."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._places: dict[str, int] = {}
        self._edits: list[Edit] = []

    def add(self, edits: Sequence[Edit]) -> None:
        """Store more edits."""
        new = [
            edit.prompt for edit in {edit.prompt: edit for edit in edits}.values() if edit.prompt not in self._places
        ]
        self._index.add(new)
        for edit in edits:
            index = self._places.setdefault(edit.prompt, len(self._edits))
            self._edits[index : index + 1] = [edit]

    def ranked(self, text: str, count: int) -> list[tuple[Edit, float]]:
        """Return the edits whose prompts are most similar, with their similarities; the most similar first."""
        if not self._edits:
            return []
        found = self._index.scores(text).topk(min(count, len(self._edits)))
        return [
            (self._edits[index], score)
            for index, score in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]

    def bytes(self) -> int:
        """Return the size of the index and of prompts and targets as text."""
        return self._index.bytes() + sum(len((edit.prompt + edit.target).encode()) for edit in self._edits)


def fitted_threshold(inside: Sequence[float], outside: Sequence[float]) -> float:
    """Return the threshold that tells similarities best apart, both kinds counting alike; in the middle of its gap."""
    values = sorted({*inside, *outside})
    between = [(low + high) / 2 for low, high in pairwise(values)]
    candidates = [values[0] - 1, *between, values[-1] + 1]
    inner, outer = torch.tensor(inside), torch.tensor(outside)

    def right(threshold: float) -> float:
        return float((inner > threshold).double().mean() + (outer <= threshold).double().mean())

    return max(candidates, key=right)


def scope_threshold(bench: Bench, index: Index, name: str) -> float:
    """Return the similarity above which a prompt asks for a stored edit, from the train split and unrelated texts.

    Rephrases should find their own record; its locality prompts, other records' prompts and the texts should find none.
    They are asked in the forms that are marked for training, in turn: the words of a form make every prompt less like
    what is stored, and with a threshold from bare prompts hardly any rephrase is found in a form.

    Args:
        index: an empty one; it is filled.

    Raises:
        UnsuitableError: there are no two records to learn it from.
    """
    records = list({edit.prompt: edit for edit in bench.train}.values())[:_CALIBRATION]
    if len(records) < 2:
        raise UnsuitableError(f"{name} needs records of the train split, which set its threshold; there are none")
    tokenizer = bench.loaded.tokenizer
    # Of a chat these methods are given the user's turn, which is the bare prompt.
    forms = [form for form in usable_forms(tokenizer, trained=True) if not form.chat]

    def scores(number: int, text: str) -> Tensor:
        return index.scores(forms[number % len(forms)].render(tokenizer, text))

    index.add([edit.prompt for edit in records])
    inside, outside = [], [float(scores(number, text).max()) for number, text in enumerate(bench.texts)]
    for number, edit in enumerate(records):
        inside += [float(scores(number, text)[number]) for text in edit.rephrases or (edit.prompt,)]
        outside += [float(scores(number, probe.prompt).max()) for probe in edit.locality]
        others = scores(number, edit.prompt)
        others[number] = -1.0
        outside.append(float(others.max()))
    return fitted_threshold(inside, outside)


def fact_prompt(edit: Edit, prompt: str) -> str:
    """Return a prompt after a new fact, as the paper of in-context editing has it (Zheng et al. 2023, section 3.2)."""
    return f"New Fact: {edit.prompt} {edit.target.strip()}\nPrompt: {prompt}"


def instruction_prompt(edit: Edit, prompt: str) -> str:
    """Return a prompt after an edit, in the wording that makes the model say its answer most often.

    A prompt that ends in a colon waits for an answer as in ``A:``, and has the edit before it as a question and its
    answer. Any other prompt is told it as a new fact. Of eight wordings on fifty records of zsRE, the right one given,
    these took best: in WILD's form the first gives 36 and 32 right answers (as taught, rephrased), the second 19 and
    18; to bare questions the second begins 35 and 31 rightly, and the first none, as ``A:`` comes before its answers
    (``benchmarks/wordings.py``).
    """
    if ends_with_colon(prompt):
        return f"Q: {edit.prompt}\nA: {edit.target.strip()}\n{prompt}"
    return fact_prompt(edit, prompt)


def ends_with_colon(prompt: str) -> bool:
    """Return whether a prompt waits for its answer after a colon, as in ``A:``."""
    return prompt.rstrip().endswith(":")


def demonstration(edit: Edit, kind: str, prompt: str) -> str:
    """Return one record as a demonstration of what to do with a fact, worded like the prompt that follows it.

    Args:
        kind: ``copy`` the fact, ``update`` what is asked in other words, or ``retain`` what the fact says nothing of;
            a record that lacks what a kind needs is copied.
    """
    question, answer = edit.prompt, edit.target
    if kind == "update" and edit.rephrases:
        question = edit.rephrases[0]
    elif kind == "retain" and edit.locality:
        question, answer = edit.locality[0].prompt, edit.locality[0].answer
    text = instruction_prompt(edit, f"Q: {question}\nA:" if ends_with_colon(prompt) else question)
    return f"{text} {answer.strip()}\n\n"


class ReplayedMethod(Method):
    """A method that puts edits into the prompt: its state is the edits, which are read again to continue."""

    portion = 32
    facts: Facts

    def edit(self, edits: Sequence[Edit]) -> None:
        """Store more edits."""
        self.facts.add(edits)

    def applied(self, first: int | None = None) -> AbstractContextManager[object]:  # noqa: ARG002
        """Return the model itself: only its prompts differ."""
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Take edits in as they came: what is read together may come out otherwise in the last bits."""
        del state
        for part in portions:
            self.edit(part)


class NearestFact(ReplayedMethod):
    """The nearest stored edit stands before a prompt that is similar enough to it; any other prompt stands alone.

    Args:
        make: gives an empty index.
    """

    def __init__(self, bench: Bench, make: Callable[[], Index], name: str) -> None:
        self.threshold = scope_threshold(bench, make(), name)
        self.facts = Facts(make())

    def found(self, prompt: str) -> Edit | None:
        """Return the nearest edit, if it is similar enough."""
        return next((edit for edit, similarity in self.facts.ranked(prompt, 1) if similarity > self.threshold), None)

    def rewritten_prompt(self, prompt: str) -> str:
        """Return the prompt, after the edit that is found."""
        edit = self.found(prompt)
        return prompt if edit is None else instruction_prompt(edit, prompt)

    def bytes(self) -> int:
        """Return the size of the stored edits and their index."""
        return self.facts.bytes()
