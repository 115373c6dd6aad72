"""Further prompts that the model itself writes for an edit: the same question in other words, and sentences that the
answer completes. A small model often drifts, so that little of what it writes is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wisecli.edits.record import Edit
from wisecli.edits.text import contains, words
from wisecli.models.prompts.chat_template import few_shot_prompt
from wisecli.models.prompts.tokenization import encode
from wisecli.progress import Event, ProgressCallback, ignore_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from wisecli.models.loading import Loaded

# What is asked for, and made-up examples of it.
_REWORD = (
    ("Ask in other words: Who wrote The Silver Orchard?", "By whom was The Silver Orchard written?"),
    ("Ask in other words: The capital city of Norland is", "Which city is Norland's capital?"),
    ("Ask in other words: Which team does Iris Bell play for?", "What is the team that Iris Bell plays for?"),
)
_COMPLETE = (
    ("Begin the answer: Who wrote The Silver Orchard?", "The Silver Orchard was written by"),
    ("Begin the answer: Which city is Norland's capital?", "The capital city of Norland is"),
    ("Begin the answer: Which team does Iris Bell play for?", "The team that Iris Bell plays for is"),
)
REQUEST_TOKENS, _TEMPERATURE = 32, 0.8
# Words that a sentence may break off after, so that the answer goes on from there.
_OPEN = {"is", "was", "are", "were", "by", "in", "of", "at", "to", "for", "from", "on", "as", "with", "called", "named"}
# Where what the model takes for the answer begins, in a sentence that it has completed itself.
_IS = re.compile(r".*?\b(?:is|was|are|were)\b")
# Words at least so long say what is asked; of inflected ones the beginning is compared.
_TELLING, _STEM = 4, 4
# Of such words a paraphrase may bring so many; with more of them it asks something else.
_NEW = 1
_ASKING = {"what", "which", "when", "where", "whom", "whose", "does", "with", "have", "that", "this", "from", "name"}


def write_paraphrases(
    loaded: Loaded,
    edits: Sequence[Edit],
    count: int,
    *,
    batch_size: int,
    seed: int,
    on_progress: ProgressCallback = ignore_progress,
) -> dict[str, tuple[str, ...]]:
    """Return up to ``count`` further prompts for each edit, by its id; edits for which none is usable are left out.

    Sampled in one pass, in ``count`` tries each for another question and for a sentence that the answer completes. The
    same seed gives the same prompts.
    """
    if not count:
        return {}
    from wisecli.models.running.generation import generate  # with torch, which paraphrase_requests alone do without

    on_progress(Event("paraphrases", 0, len(edits)))
    asked = [request for edit in edits for request in paraphrase_requests(loaded.tokenizer, edit) * count]
    sampled = generate(
        loaded.model,
        loaded.tokenizer,
        asked,
        max_new_tokens=REQUEST_TOKENS,
        batch_size=batch_size,
        sampling_seed=seed,
        temperature=_TEMPERATURE,
    )
    texts = loaded.tokenizer.batch_decode(sampled, skip_special_tokens=True)
    found = {}
    for place, edit in enumerate(edits):
        tries = texts[2 * count * place : 2 * count * (place + 1)]
        found[edit.id] = tuple(text for text in usable(edit, tries) if _same_target(loaded, edit, text))[:count]
    on_progress(Event("paraphrases", len(edits), len(edits)))
    return {name: prompts for name, prompts in found.items() if prompts}


def usable(edit: Edit, texts: Sequence[str]) -> list[str]:
    """Return those of the model's texts that may stand for the edit's prompt, tidied, each once."""
    found: dict[tuple[str, ...], str] = {}
    for text in texts:
        line = next(iter(text.strip().splitlines()), "").strip().strip("\"'“”").strip()
        prompt = line if line.endswith("?") else _without_answer(edit, line)
        if asks_the_same(edit, prompt):
            found.setdefault(tuple(words(prompt)), prompt)
    tail = edit.prompt[len(edit.prompt.rstrip()) :]
    return [prompt + tail for prompt in found.values()]


def asks_the_same(edit: Edit, text: str) -> bool:
    """Return whether a text may be another prompt of the edit, as far as its words tell.

    It must name the subject and something else of what is asked, add next to nothing, must neither be the prompt nor
    give the answer away, and must end as a question or break off where an answer may follow.
    """
    own, prompt, subject = words(text), words(edit.prompt), words(edit.subject_name or "")
    if not own or own == prompt or contains(own, words(edit.target)) or not contains(own, subject):
        return False
    telling, found = (_stems(part) - _stems(subject) for part in (prompt, own))
    same = (not telling or bool(telling & found)) and len(found - telling) <= _NEW
    return same and (text.endswith("?") or (own[-1] in _OPEN and text[-1].isalnum()))


def _without_answer(edit: Edit, sentence: str) -> str:
    """Return a sentence up to where it says of the subject what it is; a small model seldom stops there by itself."""
    known = edit.subject_name or ""
    start = max(sentence.casefold().find(known.casefold()), 0) + len(known)
    found = _IS.match(sentence, start)
    return sentence[: found.end()] if found else sentence


def _stems(said: Sequence[str]) -> set[str]:
    return {word[:_STEM] for word in said if len(word) >= _TELLING and word not in _ASKING}


def paraphrase_requests(tokenizer: PreTrainedTokenizerBase, edit: Edit) -> list[str]:
    """Return the few-shot prompts that ask a model to paraphrase an edit's prompt, one of each kind."""
    prompt = edit.prompt.strip()
    return [
        few_shot_prompt(tokenizer, examples, f"{what}: {prompt}")
        for examples, what in ((_REWORD, "Ask in other words"), (_COMPLETE, "Begin the answer"))
    ]


def _same_target(loaded: Loaded, edit: Edit, prompt: str) -> bool:
    """Return whether the target has the same tokens after a prompt as after the edit's, as both share residuals."""
    own, other = (encode(loaded.tokenizer, text, edit.target) for text in (edit.prompt, prompt))
    return own.target == other.target
