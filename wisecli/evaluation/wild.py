"""WILD, a published protocol of generated answers (Yang et al. 2025, "The Mirage of Model Editing", arXiv 2502.11177).

After the authors' code (github.com/WanliYoung/Revisit-Editing-Evaluation, ``test_prediction_acc_real`` with the context
``qa_inst`` and the metric ``exact_match``): the task's instruction before the question, greedy decoding of 50 tokens at
most, until a token holds a full stop or a line break or ends the text; then equality after SQuAD's normalisation.
Locality is whether the whole answer in that context is the unedited model's. Portability is generated in the same way
(theirs is teacher-forced; EasyEdit's later code generates it).
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from wisecli.edits.record import Edit
from wisecli.evaluation.answers import Answer, Answers
from wisecli.evaluation.results import Results, contradictory, words_of
from wisecli.models.prompts.prompt_forms import Form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The form "wild" of forms.toml has one line break before the question; the authors' code has two.
WILD = Form("wild protocol", text="Please answer the question:\n\nQ: {}\nA:")
MAX_NEW_TOKENS = 50
_MARKS = (".", "\n")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_UNPUNCTUATED = str.maketrans("", "", string.punctuation)


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens with a full stop or a line break in them."""
    pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return frozenset(token for token, piece in enumerate(pieces) if any(mark in piece for mark in _MARKS))


def normalized(text: str) -> str:
    """Return a text normalised as SQuAD does: small letters, no punctuation, no articles, single blanks."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_UNPUNCTUATED)).split())


def measure_wild(answers: Answers, edits: Sequence[Edit], records: Sequence[Edit], *, before: bool) -> Results:
    """Return ``wild_as_taught`` (WILD's reliability), ``wild_rephrased``, ``wild_portability`` and ``wild_locality``.

    Means over an edit's prompts, then over edits; what erases an answer is left out.

    Args:
        answers: of 50 tokens at most, with :func:`stop_tokens`.
        records: all that may want another answer to the same question.
        before: whether the unedited model is asked, too; without it there is no locality.
    """
    groups = _groups(edits, contradictory(records))
    kept = {place: [probe.prompt for probe in edit.locality] for place, edit in enumerate(edits)} if before else {}
    prompts = [text for group in groups.values() for pairs in group.values() for text, _ in pairs]
    prompts = list(dict.fromkeys([*prompts, *(text for texts in kept.values() for text in texts)]))
    said = _by_prompt(prompts, answers.after([answers.edited_text(WILD, text) for text in prompts], stage="answers"))
    found = Results()
    _add(found, groups, said)
    if before:
        texts = [WILD.render(answers.tokenizer, text) for text in prompts]
        earlier, unedited = _by_prompt(prompts, answers.before(texts)), Results()
        _add(unedited, groups, earlier)
        found.before.update(unedited.figures)
        same = {place: [float(said[text] == earlier[text]) for text in texts] for place, texts in kept.items()}
        found.add("wild_locality", same)
    return found


def _groups(edits: Sequence[Edit], contradicted: Collection[str]) -> dict[str, dict[int, list[tuple[str, str]]]]:
    """Return prompts and answers of each figure, by the edits' places."""
    answered = {place: edit for place, edit in enumerate(edits) if not edit.erased}
    rephrased = {place: [(text, edit.answer) for text in edit.rephrases] for place, edit in answered.items()}
    unique = {
        place: pairs
        for place, pairs in rephrased.items()
        if not {words_of(text) for text in (answered[place].prompt, *answered[place].rephrases)} & set(contradicted)
    }
    return {
        "wild_as_taught": {place: [(edit.prompt, edit.answer)] for place, edit in answered.items()},
        "wild_rephrased": rephrased,
        "wild_rephrased_unique": unique,
        "wild_portability": {
            place: [(probe.prompt, probe.answer) for probe in edit.portability] for place, edit in answered.items()
        },
    }


def _by_prompt(prompts: Sequence[str], answers: Sequence[Answer]) -> dict[str, str]:
    return {prompt: answer.text for prompt, answer in zip(prompts, answers, strict=True)}


def _add(found: Results, groups: dict[str, dict[int, list[tuple[str, str]]]], answers: dict[str, str]) -> None:
    """Add the shares of answers that are the right ones once both are normalised."""
    for name, group in groups.items():
        equal = {
            place: [float(normalized(answers[text]) == normalized(target)) for text, target in pairs]
            for place, pairs in group.items()
        }
        found.add(name, equal)
