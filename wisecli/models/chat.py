"""Prompts in a model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wisecli.errors import ModelError, reason_of
from wisecli.routing.prompts import TurnMarks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as the user's turn in the model's chat template, up to where the answer begins.

    Raises:
        ModelError: the tokenizer has no chat template, or one that fails.
    """
    return chat_turns(tokenizer, [("user", prompt)])


def chat_turns(tokenizer: PreTrainedTokenizerBase, told: Sequence[tuple[str, str]]) -> str:
    """Turns of a chat, by role and text, in the model's chat template, up to where the next answer begins.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError("the model's tokenizer has no chat template; leave out --chat")
    return _chat(tokenizer, told)


def shown_how(tokenizer: PreTrainedTokenizerBase, examples: Sequence[tuple[str, str]], asked: str) -> str:
    """A request after examples of requests and replies, up to where the reply begins.

    In the model's chat template, or without one as paragraphs, two a turn.
    """
    if not tokenizer.chat_template:
        return "".join(f"{request}\n{reply}\n\n" for request, reply in examples) + f"{asked}\n"
    told = [(role, text) for pair in examples for role, text in zip(("user", "assistant"), pair, strict=True)]
    return _chat(tokenizer, [*told, ("user", asked)])


def turn_marks(tokenizer: PreTrainedTokenizerBase) -> TurnMarks:
    """The tokens by which a model's chat template marks turns; the special ones alone, if it opens none for answers."""
    special = special_ids(tokenizer)
    return TurnMarks(*_opener(tokenizer, set(special)), tuple(special))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's special tokens, ascending."""
    # What stands for words that the tokenizer does not know is a word.
    return sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def _opener(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What an assistant's turn begins with, and the special tokens in it that no bare text begins with."""
    if not tokenizer.chat_template:
        return (), ()
    asked = [{"role": "user", "content": "a"}]
    try:
        closed, opened = (
            tokenizer(
                str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=opens)),
                add_special_tokens=False,
            )["input_ids"]
            for opens in (False, True)
        )
    except Exception:  # a template is a program of the model's; whoever asks in a chat is told of it
        return (), ()
    if opened[: len(closed)] != closed:
        return (), ()
    opener = tuple(opened[len(closed) :])
    return opener, tuple(sorted((set(opener) & special) - set(tokenizer("a")["input_ids"])))


def _chat(tokenizer: PreTrainedTokenizerBase, told: Sequence[tuple[str, str]]) -> str:
    """Turns of a chat, by role and text, and the opening of the next; the tokenizer adds the beginning of text."""
    turns = [{"role": role, "content": text} for role, text in told]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of the model's, and raises what it likes
        raise ModelError(
            f"the model's chat template cannot be used ({reason_of(error)}); mend it, or leave out --chat"
        ) from error
    opening = tokenizer.bos_token
    added = bool(opening) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(opening)) if added else text
