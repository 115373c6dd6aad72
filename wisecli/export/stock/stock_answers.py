"""What a stock checkpoint answers, beside the base model and the routed form: all of its edits are asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.edits.record import Edit
from wisecli.export.stock.base_answers import LENGTH, BaseAnswers, bare_and_in_chat
from wisecli.export.stock.one_pass import changed_by, goes_on_with, next_tokens
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row, encode
from wisecli.models.running.activations import layers_of
from wisecli.models.running.generation import generate, opened
from wisecli.models.running.shrinking_batches import unedited_beginnings
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.passes.routed_pass import Override, overridden_by

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from wisecli.models.running.shrinking_batches import Hopeless

_BATCH = 32
# The routed form is asked so many edits, spaced evenly; an answer may be so many tokens longer than the longest target.
_ASKED, _MARGIN = 200, 4
# A checkpoint that finds less than this share of the rephrases that the router finds is reported.
_FALLS_OFF = 0.9
# So many lost edits are named.
_NAMED = 5


@dataclass(frozen=True)
class LostEdit:
    """An edit whose own prompt is not answered by its target, bare or in chat."""

    id: str
    prompt: str


@dataclass(frozen=True)
class Answers:
    """Shares of what is answered greedily.

    ``as_taught`` and ``rephrased`` are those of edits' prompts and first rephrases whose answer is the target and
    nothing else, ``unrelated`` that of unrelated tokens after which the next one stays the base model's, ``in_chat``
    that of edits' prompts in the chat template, ``unchanged`` that of unrelated texts, bare and in chat, whose answers
    stay word for word the base model's.
    """

    as_taught: float
    unrelated: float
    rephrased: float | None = None
    in_chat: float | None = None
    unchanged: float | None = None


@dataclass(frozen=True)
class Verified:
    """What a checkpoint answers beside the routed form.

    The routed form was asked ``edits``, ``tokens`` unrelated ones were looked at, and ``lost`` are the edits of the
    checkpoint that did not survive.
    """

    stock: Answers
    routed: Answers
    edits: int
    tokens: int
    lost: tuple[LostEdit, ...] = ()


@dataclass(frozen=True)
class _Asked:
    """A model with what is needed to ask it.

    Args:
        may_change: which rows of unrelated text it may go on with otherwise than the base model.
        before: the likeliest tokens of the base model after every token of rows.
    """

    loaded: Loaded
    may_change: Callable[[Sequence[Row]], list[bool]]
    before: Callable[[Sequence[Row]], list[list[int]]]
    on_progress: ProgressCallback


def verified(
    base: BaseAnswers, routed: Loaded, stock: Loaded, manifest: Manifest, last: int, on_progress: ProgressCallback
) -> Verified:
    """Ask the routed form some of a memory's edits, and a checkpoint all of them.

    Args:
        routed: the base model with the memory in its place.
        stock: the checkpoint.
        last: how many blocks behind the last layer are of the memory: those that change what it says.
    """
    sample, site = evenly_spaced(manifest.edits), manifest.site

    def before(rows: Sequence[Row]) -> list[list[int]]:
        with overridden_by(Override(off=True)):
            return next_tokens(routed, rows, on_progress)

    def opens(rows: Sequence[Row]) -> list[bool]:
        return opened(routed.model, routed.tokenizer, [row.prompt for row in rows], batch_size=_BATCH)

    def changes(rows: Sequence[Row]) -> list[bool]:
        layers = layers_of(stock.model, site)
        return changed_by(stock, layers, range(len(layers) - last, len(layers)), site.d, rows, on_progress)

    routed_answers, _ = _answers(_Asked(routed, opens, before, on_progress), sample, sample, base)
    found, lost = _answers(_Asked(stock, changes, before, on_progress), manifest.edits, sample, base)
    return Verified(found, routed_answers, len(sample), sum(len(row) for row in base.rows), lost)


def evenly_spaced(edits: Sequence[Edit]) -> Sequence[Edit]:
    """Return as many edits as the routed form is asked, spaced evenly."""
    return edits[:: -(-len(edits) // _ASKED)]


def _answers(
    asked: _Asked, edits: Sequence[Edit], reworded: Sequence[Edit], base: BaseAnswers
) -> tuple[Answers, tuple[LostEdit, ...]]:
    """Return what a model answers to edits and to some rephrases, and where it goes on as the base model does."""
    own_prompts = [(text, edit) for edit in edits for text in bare_and_in_chat(asked.loaded, edit.prompt)]
    again = [(edit.rephrases[0], edit) for edit in reworded if edit.rephrases]
    right = _right(asked, [*own_prompts, *again])
    ways = len(own_prompts) // len(edits)
    own = [right[first : first + ways] for first in range(0, len(own_prompts), ways)]
    lost = tuple(LostEdit(edit.id, edit.prompt) for edit, answered in zip(edits, own, strict=True) if not all(answered))
    found = Answers(
        _share([answered[0] for answered in own]),
        _same_tokens(asked, base.rows),
        _share(right[len(own_prompts) :]) if again else None,
        _share([answered[1] for answered in own]) if ways > 1 else None,
        _share(_unchanged(asked, base.asked)),
    )
    return found, lost


def _right(asked: _Asked, questions: Sequence[tuple[str, Edit]]) -> list[bool]:
    """Return for which texts a model's greedy answer is that of the edit, or of one that is erased anything else.

    What a pass over text and answer cannot tell is answered token by token.
    """
    tokenizer = asked.loaded.tokenizer
    rows = [encode(tokenizer, text, edit.answer) for text, edit in questions]
    length = max(len(row.target) for row in rows) + _MARGIN
    said = [str(tokenizer.decode(list(row.target), skip_special_tokens=True)).strip() for row in rows]
    plain = [
        index for index, (_, edit) in enumerate(questions) if not edit.erased and said[index] == edit.answer.strip()
    ]
    found = goes_on_with(asked.loaded, [rows[index] for index in plain], length, asked.on_progress, "edits")
    right = {index for index, goes_on in zip(plain, found, strict=True) if goes_on}
    left = [index for index in range(len(rows)) if index not in right]
    edits = [questions[index][1] for index in left]
    hopeless = [None if edit.erased else partial(_differs, tokenizer, edit) for edit in edits]
    texts = _texts(asked, [rows[index].prompt for index in left], length, "edits", hopeless)
    right |= {index for index, edit, text in zip(left, edits, texts, strict=True) if _is_right(edit, text)}
    return [index in right for index in range(len(rows))]


def _differs(tokenizer: PreTrainedTokenizerBase, edit: Edit, tokens: list[int]) -> bool:
    """Return whether tokens no longer begin an edit's answer; the last ones may be a part of a letter."""
    begun = str(tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd").strip()
    return not edit.answer.strip().startswith(begun)


def _same_tokens(asked: _Asked, rows: Sequence[Row]) -> float:
    """Return the share of unrelated tokens after which the next one is the base model's."""
    changing = [row for row, changes in zip(rows, asked.may_change(rows), strict=True) if changes]
    pairs = zip(next_tokens(asked.loaded, changing, asked.on_progress), asked.before(changing), strict=True)
    other = sum(token != known for after, before in pairs for token, known in zip(after, before, strict=True))
    return 1 - other / sum(len(row) for row in rows)


def _unchanged(asked: _Asked, rows: Sequence[Row]) -> list[bool]:
    """Return for which unrelated texts a model's answer is the base model's, word for word."""
    decode = partial(asked.loaded.tokenizer.batch_decode, skip_special_tokens=True)
    changing = [index for index, changes in enumerate(asked.may_change(rows)) if changes]
    same = goes_on_with(
        asked.loaded, [rows[index] for index in changing], LENGTH, asked.on_progress, "unrelated answers"
    )
    left = [index for index, goes_on in zip(changing, same, strict=True) if not goes_on]
    answers = _texts(asked, [rows[index].prompt for index in left], LENGTH, "unrelated answers")
    before = [text.strip() for text in decode([list(rows[index].target) for index in left])]
    other = {index for index, text, known in zip(left, answers, before, strict=True) if text != known}
    return [index not in other for index in range(len(rows))]


def _texts(
    asked: _Asked, prompts: Sequence[Sequence[int]], length: int, stage: str, hopeless: Sequence[Hopeless | None] = ()
) -> list[str]:
    """Return greedy answers to prompts, without the blanks around them."""
    asked.on_progress(Event(stage, 0, len(prompts)))
    model, tokenizer = asked.loaded.model, asked.loaded.tokenizer
    tokens = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=length,
        batch_size=_BATCH,
        hopeless=hopeless,
        beginnings=unedited_beginnings(model),
    )
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _is_right(edit: Edit, text: str) -> bool:
    if edit.erased:
        return edit.answer.strip().casefold() not in text.casefold()
    return text == edit.answer.strip()


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def router_lines(found: Mapping[str, Any]) -> list[str]:
    """Return what a checkpoint answers beside the routed form as phrases, from what the manifest keeps."""
    lines = [f"{found['keys']} keys in {found['blocks']} decoder block{'s' * (found['blocks'] > 1)} more"]
    stock, routed = found.get("stock"), found.get("routed")
    if stock is None or routed is None:
        return [*lines, "not verified: no edit was asked"]
    names = {
        "as_taught": "as taught",
        "in_chat": "as taught, in chat",
        "rephrased": "rephrased",
        "unrelated": "unrelated next tokens",
        "unchanged": "unrelated answers, word for word",
    }
    for name, what in names.items():
        if stock.get(name) is not None and routed.get(name) is not None:
            lines.append(f"{what}: {stock[name]:.1%} (routed {routed[name]:.1%})")
    return [*lines, *_advice(stock, routed, found.get("lost") or ())]


def _advice(stock: Mapping[str, Any], routed: Mapping[str, Any], lost: Sequence[Mapping[str, str]]) -> list[str]:
    """Return what to do about edits that are lost and rephrases that are not found."""
    lines = []
    if lost:
        named = "; ".join(f"{edit['prompt']!r}" for edit in lost[:_NAMED]) + "; …" * (len(lost) > _NAMED)
        lines.append(f"{len(lost)} edits are not answered ({named}): export fewer edits, or --format routed")
    if (stock.get("rephrased") or 0.0) < _FALLS_OFF * (routed.get("rephrased") or 0.0):
        missed = 1 - (stock["rephrased"] or 0.0) / routed["rephrased"]
        lines.append(f"of the rephrases that the router finds {missed:.0%} are missed: --format routed has them")
    return lines
