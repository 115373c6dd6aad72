"""The forms that a prompt is asked in: bare, as a question with `Answer:`, in the chat template, behind a document.

The table is ``data/forms.toml``. A form puts something around a prompt, or changes how it is written, and leaves what
is asked as it is: an edit should hold in all of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from wisecli.data.packaged import packaged_table
from wisecli.models.prompts.chat_template import chat_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SLOT = "{}"
# Words shorter than this are not misspelt.
_LONG = 5


@dataclass(frozen=True)
class Form:
    """One form: the ``text`` around a prompt, the ``turns`` of a chat that it is the last of, or a ``change`` of it.

    ``trained`` says whether anything is learned in this form; the others are for evaluation.
    """

    name: str
    trained: bool = False
    text: str = _SLOT
    turns: tuple[str, ...] = ()
    system: str | None = None
    change: str | None = None

    @property
    def chat(self) -> bool:
        """Whether it needs a chat template."""
        return bool(self.turns)

    @property
    def surrounds(self) -> bool:
        """Whether it puts words around a prompt, and no turns of a chat."""
        return bool(self.text.strip(f"{_SLOT} "))

    @property
    def label(self) -> str:
        """Its name in options and in the names of figures."""
        return self.name.replace(" ", "-")

    def render(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
        """Return a prompt in this form.

        Raises:
            ModelError: it needs a chat template, and the tokenizer has none.
        """
        prompt = _changed(self.change, prompt)
        if not self.turns:
            return self.text.replace(_SLOT, prompt)
        roles = [("user", "assistant")[index % 2] for index in range(len(self.turns))]
        turns = [(role, turn.replace(_SLOT, prompt)) for role, turn in zip(roles, self.turns, strict=True)]
        return chat_turns(tokenizer, [*([("system", self.system)] if self.system else []), *turns])


@cache
def forms() -> dict[str, Form]:
    """Return all forms by their names, in the order of the table."""
    rows = packaged_table("forms.toml")["form"]
    found = [Form(**{**row, "turns": tuple(row.get("turns", ()))}) for row in rows]
    return {form.name: form for form in found}


def usable_forms(tokenizer: PreTrainedTokenizerBase, *, trained: bool | None = None) -> list[Form]:
    """Return the forms that a tokenizer can write.

    Args:
        trained: whether to return only the forms that are trained on, or only the others.
    """
    known = (form for form in forms().values() if trained is None or form.trained == trained)
    return [form for form in known if not form.chat or tokenizer.chat_template]


def _changed(change: str | None, prompt: str) -> str:
    """Return a prompt with the change of spelling that a form asks for."""
    if change == "lower":
        return prompt.lower().rstrip("?")
    if change == "upper":
        return prompt.upper()
    if change == "unmarked":
        return prompt.rstrip("?")
    if change == "misspelt":
        return _misspelt(prompt)
    return prompt


def _misspelt(prompt: str) -> str:
    """Return a prompt with two neighbouring letters of one long word exchanged, always the same two."""
    words = prompt.split(" ")
    long = [index for index, word in enumerate(words) if len(word) >= _LONG]
    if not long:
        return prompt
    rng = random.Random(prompt)
    index = rng.choice(long)
    word = words[index]
    at = rng.randrange(1, len(word) - 2)
    words[index] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)
