"""Passages → edits: questions with answers that the model draws from a text, and which of them are fit to be shown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines

from wisecli.drafting.chunking import Passage
from wisecli.edits.text import contains, words
from wisecli.io.atomic_output import writing
from wisecli.models.loading import Loaded
from wisecli.models.prompts.chat_template import few_shot_prompt
from wisecli.models.running.generation import generate
from wisecli.progress import Event, ProgressCallback, ignore_progress

_ASK = "Write questions that this text answers, each with its answer from the text.\n\n"
_EXAMPLES = (
    (
        "Opening: The library of Eskmouth is open from 9 am to 5 pm. Its director is Iris Bell, who came in 2019.",
        "Q: When is the library of Eskmouth open?\nA: from 9 am to 5 pm\n"
        "Q: Who is the director of the library of Eskmouth?\nA: Iris Bell\n"
        "Q: In which year did Iris Bell come to the library of Eskmouth?\nA: 2019",
    ),
    (
        "The Marigold engine runs on hydrogen. It was built in Norland by the Tarn company.",
        "Q: What does the Marigold engine run on?\nA: hydrogen\n"
        "Q: Where was the Marigold engine built?\nA: Norland\n"
        "Q: Which company built the Marigold engine?\nA: the Tarn company",
    ),
)
_TOKENS = 128
_PAIR = re.compile(r"^\s*Q(?:uestion)?\s*\d*[:.]\s*(.+?)\s*\n\s*A(?:nswer)?\s*\d*[:.]\s*(.+?)\s*$", re.MULTILINE)
# Whoever is asked has no text before them.
_POINTING = re.compile(
    r"\b(?:this|that|the|these|those|your)\s+(?:\w+\s+)?"
    r"(?:passages?|texts?|paragraphs?|documents?|articles?|pages?|sections?|sentences?|excerpts?|statements?)\b"
    r"|\b(?:above|below|mentioned)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
# A name in a question, or where there is none a word of this length, must be the passage's.
_TELLING = 4


@dataclass(frozen=True)
class Pair:
    """A question with its answer, what it is about, and the line of the document that it was drawn from."""

    question: str
    answer: str
    subject: str | None
    line: int

    def as_record(self) -> dict[str, Any]:
        """Return an edit record as files of edits have it."""
        record = {"prompt": self.question, "target": self.answer}
        return record if self.subject is None else {**record, "subject": self.subject}


def draw_pairs(
    loaded: Loaded,
    found: Sequence[Passage],
    *,
    each: int,
    batch_size: int,
    on_progress: ProgressCallback = ignore_progress,
) -> list[Pair]:
    """Return up to ``each`` usable pairs of every passage, no question twice."""
    shown = [(_ASK + text, pairs) for text, pairs in _EXAMPLES]
    requests = [few_shot_prompt(loaded.tokenizer, shown, _ASK + passage.whole) for passage in found]
    kept: dict[tuple[str, ...], Pair] = {}
    for first in range(0, len(requests), batch_size):
        on_progress(Event("drafting", first, len(requests)))
        batch = slice(first, first + batch_size)
        answers = generate(loaded.model, loaded.tokenizer, requests[batch], max_new_tokens=_TOKENS)
        texts = loaded.tokenizer.batch_decode(answers, skip_special_tokens=True)
        for passage, text in zip(found[batch], texts, strict=True):
            for pair in fitting(passage, text)[:each]:
                kept.setdefault(tuple(words(pair.question)), pair)
    on_progress(Event("drafting", len(requests), len(requests)))
    return list(kept.values())


def fitting(passage: Passage, text: str) -> list[Pair]:
    """Return the pairs in what the model wrote about a passage that are fit to be shown."""
    pairs = [(question.strip(), answer.strip().rstrip(".").strip()) for question, answer in _PAIR.findall(text)]
    return [
        Pair(question, answer, shared_name(question, passage.whole), passage.line)
        for question, answer in pairs
        if is_fit(passage, question, answer)
    ]


def is_fit(passage: Passage, question: str, answer: str) -> bool:
    """Return whether a pair can stand without its passage, and says what that says.

    The answer must be words of the passage; the question must not hold it, nor point to a text that nobody sees, and
    must name something of the passage.
    """
    asked, answered, stated = words(question), words(answer), words(passage.whole)
    if (
        not question.endswith("?")
        or not answered
        or not contains(words(passage.text), answered)
        or contains(asked, answered)
    ):
        return False
    named = shared_name(question, passage.whole) or any(len(word) >= _TELLING and word in stated for word in asked)
    return bool(named) and not _POINTING.search(question)


def shared_name(question: str, text: str) -> str | None:
    """Return the longest run of words, from a capital on, that stands in both, without small words at its end.

    A question's first word is no name: it has its capital from the place.
    """
    found, there = list(_WORD.finditer(question)), _WORD.findall(text)
    longest = ""
    for start, first in enumerate(found[1:], start=1):
        if not first[0][0].isupper():
            continue
        end = start + 1
        while end <= len(found) and contains(there, [word[0] for word in found[start:end]]):
            name = question[first.start() : found[end - 1].end()]
            if len(name) > len(longest) and (len(found[end - 1][0]) >= _TELLING or not found[end - 1][0].islower()):
                longest = name
            end += 1
    return longest or None


def save_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as a file of edits.

    Raises:
        NoSpaceError: the disk is full.
        UnwritableError: nothing may be written there.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with jsonlines.open(path, "w") as file:
            file.write_all(pair.as_record() for pair in pairs)
