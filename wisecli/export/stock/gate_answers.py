"""What a checkpoint with a gate answers, beside the base model and the routed form: all of its edits are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.edits.record import Edit
from wisecli.export.stock.base_answers import LENGTH, BaseAnswers, bare_and_in_chat
from wisecli.export.stock.one_pass import goes_on_with, next_tokens
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import encode
from wisecli.models.running.generation import generate, opened
from wisecli.progress import Event, ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from wisecli.models.running.shrinking_batches import Hopeless

_BATCH = 32
# The routed form is asked so many edits, spaced evenly; an answer may be so many tokens longer than the longest target.
_ASKED, _MARGIN = 200, 4
# A gate that finds less than this share of the rephrases that the router finds is reported.
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


def verified(
    base: BaseAnswers, routed: Loaded, stock: Loaded, manifest: Manifest, on_progress: ProgressCallback
) -> Verified:
    """Ask the routed form some of a memory's edits, and a checkpoint all of them.

    Args:
        routed: the base model with the memory in its place.
        stock: the checkpoint.
    """
    some = evenly_spaced(manifest.edits)
    routed_answers, _ = _answers(routed, some, some, base, on_progress)
    found, lost = _answers(stock, manifest.edits, some, base, on_progress)
    tokens = sum(len(row) for row in base.next_tokens)
    return Verified(found, routed_answers, len(some), tokens, lost)


def evenly_spaced(edits: Sequence[Edit]) -> Sequence[Edit]:
    """Return as many edits as the routed form is asked, spaced evenly."""
    return edits[:: -(-len(edits) // _ASKED)]


def _answers(
    loaded: Loaded, edits: Sequence[Edit], reworded: Sequence[Edit], base: BaseAnswers, on_progress: ProgressCallback
) -> tuple[Answers, tuple[LostEdit, ...]]:
    """Return what a model answers to edits and to the rephrases of some, and where it goes on as the base model
    does.
    """
    own_prompts = [(text, edit) for edit in edits for text in bare_and_in_chat(loaded, edit.prompt)]
    again = [(edit.rephrases[0], edit) for edit in reworded if edit.rephrases]
    right = _right(loaded, [*own_prompts, *again], on_progress)
    ways = len(own_prompts) // len(edits)
    own = [right[first : first + ways] for first in range(0, len(own_prompts), ways)]
    lost = tuple(LostEdit(edit.id, edit.prompt) for edit, answered in zip(edits, own, strict=True) if not all(answered))
    found = Answers(
        _share([answered[0] for answered in own]),
        _same_tokens(loaded, base, on_progress),
        _share(right[len(own_prompts) :]) if again else None,
        _share([answered[1] for answered in own]) if ways > 1 else None,
        _share(_unchanged(loaded, base, on_progress)),
    )
    return found, lost


def _right(loaded: Loaded, asked: Sequence[tuple[str, Edit]], on_progress: ProgressCallback) -> list[bool]:
    """Return for which texts a model's greedy answer is that of the edit, or of one that is erased anything else.

    What a pass over text and answer cannot tell is answered token by token.
    """
    tokenizer = loaded.tokenizer
    rows = [encode(tokenizer, text, edit.answer) for text, edit in asked]
    length = max(len(row.target) for row in rows) + _MARGIN
    said = [str(tokenizer.decode(row.target, skip_special_tokens=True)).strip() for row in rows]
    plain = [not edit.erased and text == edit.answer.strip() for (_, edit), text in zip(asked, said, strict=True)]
    right = [False] * len(rows)
    if not _decides(loaded):
        told = [index for index, one in enumerate(plain) if one]
        found = goes_on_with(loaded, [rows[index] for index in told], length, on_progress, "edits")
        for index, one in zip(told, found, strict=True):
            right[index] = one
    left = [index for index, one in enumerate(right) if not one]
    edits = [edit for _, edit in asked]
    hopeless = [None if edits[index].erased else partial(_differs, tokenizer, edits[index]) for index in left]
    texts = _texts(loaded, [asked[index][0] for index in left], length, on_progress, "edits", hopeless)
    for index, text in zip(left, texts, strict=True):
        right[index] = _is_right(edits[index], text)
    return right


def _decides(loaded: Loaded) -> bool:
    """Return whether a model decides where a prompt ends what answers it."""
    return getattr(loaded.model, "decided", None) is not None


def _differs(tokenizer: PreTrainedTokenizerBase, edit: Edit, tokens: list[int]) -> bool:
    """Return whether tokens no longer begin an edit's answer; the last ones may be a part of a letter."""
    begun = str(tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd").strip()
    return not edit.answer.strip().startswith(begun)


def _same_tokens(loaded: Loaded, base: BaseAnswers, on_progress: ProgressCallback) -> float:
    """Return the share of unrelated tokens after which the next one is the base model's."""
    rows = [row.prompt for row in base.rows]
    changing = [index for index, one in enumerate(_may_change(loaded, rows)) if one]
    after = next_tokens(loaded, [base.rows[index] for index in changing], on_progress)
    other = 0
    for index, tokens in zip(changing, after, strict=True):
        other += sum(one != known for one, known in zip(tokens.tolist(), base.next_tokens[index], strict=True))
    return 1 - other / sum(len(row) for row in base.next_tokens)


def _unchanged(loaded: Loaded, base: BaseAnswers, on_progress: ProgressCallback) -> list[bool]:
    """Return for which unrelated texts a model's answer is the base model's, word for word."""
    decode = partial(loaded.tokenizer.batch_decode, skip_special_tokens=True)
    if _decides(loaded):
        same = [not one for one in _may_change(loaded, [row.prompt for row in base.asked])]
    else:
        same = goes_on_with(loaded, base.asked, LENGTH, on_progress, "unrelated answers")
    left = [index for index, one in enumerate(same) if not one]
    answers = _texts(loaded, [base.asked[index].prompt for index in left], LENGTH, on_progress, "unrelated answers")
    known = decode([base.asked[index].target for index in left])
    for index, text, before in zip(left, answers, known, strict=True):
        same[index] = text == before.strip()
    return same


def _may_change(loaded: Loaded, prompts: Sequence[Sequence[int]]) -> list[bool]:
    """Return which prompts a model may answer otherwise than the base model."""
    if not _decides(loaded):
        return [True] * len(prompts)
    return opened(loaded.model, loaded.tokenizer, prompts, batch_size=_BATCH)


def _texts(
    loaded: Loaded,
    prompts: Sequence[str | Sequence[int]],
    length: int,
    on_progress: ProgressCallback,
    stage: str,
    hopeless: Sequence[Hopeless | None] = (),
) -> list[str]:
    """Return greedy answers to prompts, without the blanks around them."""
    on_progress(Event(stage, 0, len(prompts)))
    tokens = generate(
        loaded.model,
        loaded.tokenizer,
        prompts,
        max_new_tokens=length,
        batch_size=_BATCH,
        hopeless=hopeless,
        shared=True,
    )
    return [text.strip() for text in loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _is_right(edit: Edit, text: str) -> bool:
    if edit.erased:
        return edit.answer.strip().casefold() not in text.casefold()
    return text == edit.answer.strip()


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def gate_lines(gate: Mapping[str, Any]) -> list[str]:
    """Return what a gate answers beside the routed form as phrases, from what the manifest keeps."""
    lines = [f"{gate['keys']} keys in {gate['blocks']} decoder block{'s' * (gate['blocks'] > 1)} more"]
    stock, routed = gate.get("stock"), gate.get("routed")
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
    return [*lines, *_advice(stock, routed, gate.get("lost") or ())]


def _advice(stock: Mapping[str, Any], routed: Mapping[str, Any], lost: Sequence[Mapping[str, str]]) -> list[str]:
    """Return what to do about edits that are lost and rephrases that are not found."""
    lines = []
    if lost:
        named = "; ".join(f"{one['prompt']!r}" for one in lost[:_NAMED]) + "; …" * (len(lost) > _NAMED)
        lines.append(f"{len(lost)} edits are not answered ({named}): export fewer edits, or --format routed")
    if (stock.get("rephrased") or 0.0) < _FALLS_OFF * (routed.get("rephrased") or 0.0):
        missed = 1 - (stock["rephrased"] or 0.0) / routed["rephrased"]
        lines.append(f"of the rephrases that the router finds {missed:.0%} are missed: --format routed has them")
    return lines
