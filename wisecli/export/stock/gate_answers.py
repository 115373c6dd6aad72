"""What a checkpoint with a gate answers, beside the base model and the routed form: all of its edits are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.data.corpus import texts_beside_gates
from wisecli.edits.record import Edit
from wisecli.models.loading import Loaded
from wisecli.models.prompts.prompt_forms import forms
from wisecli.models.prompts.tokenization import Row, collate, encode, in_batches
from wisecli.models.running.generation import generate
from wisecli.progress import Event, ProgressCallback

_BATCH = 32
# The routed form is asked so many edits, spaced evenly; an answer may be so many tokens longer than the longest target.
_ASKED, _MARGIN = 200, 4
# So many unrelated texts are answered, bare and in chat, in so many tokens.
_UNRELATED, _LENGTH = 40, 16
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


@dataclass(frozen=True)
class BaseAnswers:
    """What the base model makes of unrelated text: next tokens (n,) after every token of rows, and answers to texts."""

    rows: tuple[Row, ...]
    next_tokens: Tensor
    asked: tuple[str, ...]
    answers: tuple[str, ...]


def base_answers(loaded: Loaded, edits: Sequence[Edit], on_progress: ProgressCallback) -> BaseAnswers:
    """Return what the base model makes of unrelated texts that no gate was fitted to.

    Args:
        edits: those whose prompts that are to stay as they are count as well.
    """
    tokenizer = loaded.tokenizer
    rows = [Row(tuple(tokenizer(text)["input_ids"]), ()) for text in texts_beside_gates()]
    probes = [
        encode(tokenizer, probe.prompt, probe.answer) for edit in _evenly_spaced(edits) for probe in edit.locality
    ]
    rows += [Row((*pair.prompt, *pair.target), ()) for pair in probes]
    asked = [text for plain in texts_beside_gates(_UNRELATED) for text in _written(loaded, plain)]
    answers = _texts(loaded, asked, _LENGTH, on_progress, "unrelated answers")
    return BaseAnswers(tuple(rows), _next_tokens(loaded, rows, on_progress), tuple(asked), tuple(answers))


def verified(
    base: BaseAnswers, routed: Loaded, stock: Loaded, manifest: Manifest, on_progress: ProgressCallback
) -> Verified:
    """Ask the routed form some of a memory's edits, and a checkpoint all of them.

    Args:
        routed: the base model with the memory in its place.
        stock: the checkpoint.
    """
    some = _evenly_spaced(manifest.edits)
    routed_answers, _ = _answers(routed, some, some, base, on_progress)
    found, lost = _answers(stock, manifest.edits, some, base, on_progress)
    return Verified(found, routed_answers, len(some), len(base.next_tokens), lost)


def _evenly_spaced(edits: Sequence[Edit]) -> Sequence[Edit]:
    """Return as many edits as the routed form is asked, spaced evenly."""
    return edits[:: -(-len(edits) // _ASKED)]


def _written(loaded: Loaded, text: str) -> list[str]:
    """Return a text bare and, where there is a template, in chat."""
    names = ("bare", "chat") if loaded.tokenizer.chat_template else ("bare",)
    return [forms()[name].render(loaded.tokenizer, text) for name in names]


def _answers(
    loaded: Loaded, edits: Sequence[Edit], reworded: Sequence[Edit], base: BaseAnswers, on_progress: ProgressCallback
) -> tuple[Answers, tuple[LostEdit, ...]]:
    """Return what a model answers to edits and to the rephrases of some, and where it goes on as the base model
    does.
    """
    own_prompts = [(text, edit) for edit in edits for text in _written(loaded, edit.prompt)]
    again = [(edit.rephrases[0], edit) for edit in reworded if edit.rephrases]
    length = max(len(encode(loaded.tokenizer, edit.prompt, edit.answer).target) for edit in edits) + _MARGIN
    texts = _texts(loaded, [text for text, _ in (*own_prompts, *again)], length, on_progress, "edits")
    right = [_right(edit, text) for text, (_, edit) in zip(texts, (*own_prompts, *again), strict=True)]
    ways = len(own_prompts) // len(edits)
    own = [right[first : first + ways] for first in range(0, len(own_prompts), ways)]
    lost = tuple(LostEdit(edit.id, edit.prompt) for edit, answered in zip(edits, own, strict=True) if not all(answered))
    same = (_next_tokens(loaded, base.rows, on_progress) == base.next_tokens).float().mean()
    answers = _texts(loaded, base.asked, _LENGTH, on_progress, "unrelated answers")
    found = Answers(
        _share([answered[0] for answered in own]),
        float(same),
        _share(right[len(own_prompts) :]) if again else None,
        _share([answered[1] for answered in own]) if ways > 1 else None,
        _share([one == other for one, other in zip(answers, base.answers, strict=True)]),
    )
    return found, lost


def _texts(loaded: Loaded, prompts: Sequence[str], length: int, on_progress: ProgressCallback, stage: str) -> list[str]:
    """Return greedy answers to prompts, without the blanks around them."""
    on_progress(Event(stage, 0, len(prompts)))
    tokens = generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=length, batch_size=_BATCH)
    return [text.strip() for text in loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@torch.no_grad()
def _next_tokens(loaded: Loaded, rows: Sequence[Row], on_progress: ProgressCallback) -> Tensor:
    """Return the arg-max (n,) after every token of some rows."""
    found: dict[int, Tensor] = {}
    for indices in in_batches(rows, _BATCH):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        logits = loaded.model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).logits
        best = logits.argmax(-1)
        found |= {index: best[row][batch.mask[row].bool()].cpu() for row, index in enumerate(indices)}
        on_progress(Event("unrelated text", len(found), len(rows)))
    return torch.cat([found[index] for index in range(len(rows))])


def _right(edit: Edit, text: str) -> bool:
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
