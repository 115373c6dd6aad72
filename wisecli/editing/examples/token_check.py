"""Edits in tokens, before any weights are loaded: none may be longer than what the model reads, or steer it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wisecli.config import EditSettings
from wisecli.editing.examples.context_prefixes import in_context, trained_forms
from wisecli.editing.examples.paraphrases import REQUEST_TOKENS, paraphrase_requests
from wisecli.edits.record import Edit, Numbered
from wisecli.errors import EditFileError
from wisecli.io.json_schema import shown
from wisecli.models.prompts.tokenization import first_tokens, without_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Beyond the tokens that a context is sampled to: the word that opens it, and the full stop that ends it.
_AROUND = 4
# What may be said instead of an erased answer.
_INSTEAD = 16


class Length(NamedTuple):
    """Tokens of an edit: of its prompt, of its target, and of what may be put before the prompt."""

    prompt: int
    target: int
    before: int


# Of an edit that nobody has counted.
USUAL_LENGTH = Length(12, 6, 12)


@dataclass(frozen=True)
class Reader:
    """What reads edits: a model's tokenizer, how many tokens the model reads at most, and how many it has rows for.

    Numbers are ``None`` where they are not known. Edits are counted once, as a plan asks for what was checked before.
    """

    tokenizer: PreTrainedTokenizerBase
    window: int | None
    vocabulary: int | None = None
    _counted: dict[tuple[Edit, EditSettings], Length] = field(default_factory=dict, compare=False)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of texts, those included that open each."""
        return [len(tokens) for tokens in self.tokenizer(list(texts))["input_ids"]] if texts else []

    def trained_forms(self, settings: EditSettings) -> tuple[str, ...]:
        """Return the contexts that stand for forms which edits are trained in."""
        return tuple(trained_forms(self.tokenizer, settings, self.window))

    def require(
        self, file: str, numbered: Sequence[Numbered], settings: EditSettings, *, allow_special: bool = False
    ) -> None:
        """Check that the model reads all of each edit, and that each is text alone.

        Args:
            file: the name of the file that the edits are of.
            allow_special: whether tokens that steer the model may stand in prompts and targets.

        Raises:
            EditFileError: naming the line.
            ModelError: the chat template cannot be used.
        """
        special = None if allow_special else _Special(self.tokenizer)
        larger = self.vocabulary is not None and max(self.tokenizer.get_vocab().values()) >= self.vocabulary
        forms = self.trained_forms(settings) if numbered else ()
        for line, edit in numbered:
            if larger and (wrong := self._without_row(edit, forms)):
                raise EditFileError(Path(file), wrong, line=line)
            if special is not None and (found := special.first_in(edit)):
                field, token = found
                raise EditFileError(
                    Path(file),
                    f"`{field}` has {shown(token)}, which steers the model and is no text; reword it, or pass "
                    "--set allow_special_tokens=true",
                    line=line,
                )
            for what, tokens, shorter in self._readings(edit, settings, forms):
                if self.window is not None and tokens > self.window:
                    reason = f"{tokens:,} tokens{what}, the model takes {self.window:,}; shorten {shorter}"
                    raise EditFileError(Path(file), reason, line=line)

    def length(self, edit: Edit, settings: EditSettings, forms: Sequence[str] | None = None) -> Length:
        """Tokens of an edit, in the longest form that it is trained in.

        Args:
            forms: what :meth:`trained_forms` returns, if it was asked before.

        Raises:
            ModelError: the chat template cannot be used.
        """
        key = edit, settings
        if key not in self._counted:
            self._counted[key] = self._length(edit, settings, self.trained_forms(settings) if forms is None else forms)
        return self._counted[key]

    def _length(self, edit: Edit, settings: EditSettings, forms: Sequence[str]) -> Length:
        pairs = [
            (edit.prompt, edit.answer),
            *((translation.prompt, translation.target) for translation in edit.translations),
        ]
        asked = [in_context(self.tokenizer, form, edit.prompt) for form in forms]
        counts = self.counts([*(prompt for prompt, _ in pairs), *(_joined(*pair) for pair in pairs), *asked])
        prompts, wholes = counts[: len(pairs)], counts[len(pairs) : 2 * len(pairs)]
        target = max(max(1, whole - prompt) for prompt, whole in zip(prompts, wholes, strict=True))
        further = (tokens - prompts[0] for tokens in counts[2 * len(pairs) :])
        before = max([settings.context_tokens + _AROUND, *further])
        return Length(max(prompts), target + (_INSTEAD if edit.erased else int(settings.train_end)), before)

    def _without_row(self, edit: Edit, forms: Sequence[str]) -> str | None:
        """Return a complaint about the first token of an edit, in any trained form, that the model has no row for."""
        contexts = ["", *forms]
        pairs = [(edit.prompt, edit.target), (edit.prompt, edit.answer)]
        pairs += [(translation.prompt, translation.target) for translation in edit.translations]
        texts = [_joined(in_context(self.tokenizer, form, prompt), said) for form in contexts for prompt, said in pairs]
        texts += [_joined(probe.prompt, probe.answer) for probe in (*edit.locality, *edit.portability)]
        texts += [edit.subject or "", *edit.rephrases, *edit.irrelevant, *edit.ood]
        tokens = [token for text in texts for token in self.tokenizer(text)["input_ids"]]
        if edit.op == "erase":
            tokens += first_tokens(self.tokenizer, edit.prompt, edit.target)
        return without_row(self.tokenizer, tokens, self.vocabulary)

    def _readings(self, edit: Edit, settings: EditSettings, forms: Sequence[str]) -> Iterator[tuple[str, int, str]]:
        """Yield what the model reads of an edit beside the bare text, its tokens, and what to shorten if they are many.

        What cannot be too long, as it has fewer bytes than the model takes tokens, is not counted.
        """
        length, both = self.length(edit, settings, forms), "the prompt or the target"
        yield "", length.prompt + length.target, both
        yield " with what is put before the prompt", sum(length), both
        if settings.augment:
            asked = max(self.counts(paraphrase_requests(self.tokenizer, edit))) + REQUEST_TOKENS
            yield " with the request for paraphrases", asked, "the prompt, or leave out augment"
        pairs = [(probe.prompt, probe.answer) for probe in (*edit.locality, *edit.portability)]
        pairs += [(text, edit.answer) for text in edit.rephrases]
        for text in (*(_joined(*pair) for pair in pairs), *edit.irrelevant, *edit.ood):
            if self.window is not None and len(text.encode()) + _AROUND > self.window:
                yield f" in {shown(text, 20)}", self.counts([text])[0], "it"


def _joined(prompt: str, target: str) -> str:
    return f"{prompt} {target}"


class _Special:
    """Finds special tokens of a tokenizer in texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        ids = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self._tokenizer, self._ids = tokenizer, ids - {tokenizer.unk_token_id}
        texts = [str(tokenizer.convert_ids_to_tokens(number)) for number in sorted(self._ids)]
        self._written = re.compile("|".join(map(re.escape, filter(None, texts)))) if any(texts) else None

    def first_in(self, edit: Edit) -> tuple[str, str] | None:
        """Return the field of an edit and the special token in it; ``None`` if there is none."""
        fields = [("prompt", edit.prompt), ("target", edit.target), ("replacement", edit.replacement or "")]
        fields += [
            ("translations", text)
            for translation in edit.translations
            for text in (translation.prompt, translation.target)
        ]
        return next(((name, token) for name, text in fields if (token := self._special_token_in(text))), None)

    def _special_token_in(self, text: str) -> str | None:
        """Return the first special token among a text's tokens; its spelling alone may be an ordinary word."""
        if self._written is None or not self._written.search(text):
            return None
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        found = next((number for number in ids if number in self._ids), None)
        return None if found is None else str(self._tokenizer.convert_ids_to_tokens(found))
