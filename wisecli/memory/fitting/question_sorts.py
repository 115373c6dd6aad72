"""By which sorts of questions edits are asked, as far as their prompts and targets say so in English."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wisecli.edits.record import Edit
from wisecli.edits.text import words
from wisecli.routing.deciding.prompt_words import written_words
from wisecli.routing.deciding.question_words import ANYTHING, NUMBER, PERSON, PLACE, REASON, question_sorts

# Words of numbers and times, besides digits; the months among them have a capital and are no names.
_MONTHS = frozenset(
    words(
        "january february march april may june july august september october november december monday tuesday "
        "wednesday thursday friday saturday sunday"
    )
)
_NUMBERS = _MONTHS | frozenset(
    words(
        "zero none no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million "
        "billion dozen half once twice thrice first second third spring summer autumn fall winter morning evening noon "
        "night midnight today yesterday tomorrow daily weekly monthly yearly annually minute minutes hour hours day "
        "days week weeks month months year years decade decades century centuries age era never always"
    )
)
# A question without a question mark has its question word among so many first words: "in what year …".
_OPENING = 2


def asked_by_tensor(edits: Sequence[Edit]) -> Tensor:
    """Return the tensor ``ASKED_BY`` of edits: (M,) bytes, of which each bit is a sort of question."""
    return torch.tensor([sum(1 << sort for sort in _asked_by(edit)) for edit in edits], dtype=torch.uint8)


def _asked_by(edit: Edit) -> set[int]:
    """Return the sorts of questions that may ask an edit: those of its own prompt if that is a question, or else those
    that its target may answer, too; "what" may ask any edit.
    """
    sorts = _sorts_of(edit.prompt, edit.subject_name or "")
    own = set[int]().union(*sorts)
    # In "The team that Ana, who was born here, plays for" such a word asks nothing.
    if own - {ANYTHING} and (edit.prompt.rstrip().endswith("?") or any(sorts[:_OPENING])):
        return own | {ANYTHING}
    return own | _answered_by(edit.answer)


def _answered_by(target: str) -> set[int]:
    """Return the sorts of questions that a target may answer."""
    if not any(word in _NUMBERS or any(map(str.isdigit, word)) for word in words(target)):
        return {PERSON, PLACE, REASON, ANYTHING}
    named = any(word[0].isupper() and word.casefold() not in _MONTHS for word in target.split())
    return {PERSON, NUMBER, PLACE, REASON, ANYTHING} if named else {NUMBER, PLACE, ANYTHING}


def _sorts_of(text: str, subject: str) -> list[set[int]]:
    """Return the sorts of questions that each word of a text begins; words of a subject are left out."""
    passed_over = set(words(subject))
    # What is not written in Latin letters is no question word, but stands between such words.
    own = [word if word.isascii() and word.isalpha() else "x" for word in words(text) if word not in passed_over]
    if not own:
        return []
    found = question_sorts(written_words(" ".join(own)))
    return [set(row.nonzero().flatten().tolist()) for row in found]
