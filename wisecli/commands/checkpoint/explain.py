"""``wise explain``: which edits a prompt is near to, what opened at every token, and what each memory would answer."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wisecli.commands.checkpoint.plot import Token, plot_tokens
from wisecli.config import LoadOptions
from wisecli.errors import ModelError
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.models.prompts.chat_template import chat_prompt
from wisecli.models.prompts.tokenization import Batch, Row, collate
from wisecli.models.running.generation import generate
from wisecli.routing.deciding.decision import Decision
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.gating.gates import MIN_ASK_PROB


@dataclass(frozen=True)
class Near:
    """A memory, or of a lookup an edit, that the prompt's end is near to.

    ``strength`` is its score there as a multiple of its threshold, ``answer`` what the model says if it answers.
    ``named`` says whether the prompt names the edit's subject, where it must, and ``fits`` whether its question words
    may ask the edit, where they have a say; ``asked`` how likely it asks the edit that it mentions, of the edit that
    would answer.
    """

    name: str
    prompt: str | None
    target: str | None
    strength: float
    answer: str
    named: bool | None = None
    asked: float | None = None
    fits: bool | None = None


@dataclass(frozen=True)
class ExplainReport:
    """Why a prompt is answered as it is; ``reason`` says which part of the router opened an edit, or refused."""

    prompt: str
    answer: str
    unedited: str
    prompt_tokens: tuple[Token, ...]
    answer_tokens: tuple[Token, ...]
    nearest: tuple[Near, ...]
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Return the one object that ``--json`` prints."""
        return {"results": asdict(self)}


def explain(
    memory: Path,
    prompt: str,
    *,
    model: str | None = None,
    nearest: int = 3,
    max_new_tokens: int = 32,
    chat: bool = False,
    plot: Path | None = None,
    load: LoadOptions = LoadOptions(),
) -> ExplainReport:
    """Look at one prompt through an edited model.

    Args:
        memory: a memory directory or an exported one.
        nearest: how many memories, or edits of a lookup, are made to answer.
        plot: a picture of the scores at every token, to be drawn there.

    Raises:
        WiseError: the memory, the model or the prompt cannot be used, or the picture not be drawn.
    """
    edited = attach(memory, model=model, load=load)
    text = chat_prompt(edited.tokenizer, prompt) if chat else prompt
    read = edited.tokenizer(text)["input_ids"]
    if not read:
        raise ModelError(f"the tokenizer leaves nothing of the prompt {prompt!r}; reword it")
    tokens = _answer(edited, text, max_new_tokens)
    with edited.unedited():
        before = _answer(edited, text, max_new_tokens)
    # What stands in for no answer is cut off.
    batch = collate([Row(tuple(read), tuple(tokens or read[:1]))]).to(edited.model.device)
    decision = edited.decide(batch)
    found = _tokens(edited, batch, tokens)
    strengths = decision.scores[0].float() / torch.tensor(edited.routed.thresholds, device=decision.scores.device)
    count = max(nearest, 1) if edited.manifest.edits else 0  # an emptied memory has a matrix that nothing opens
    ranked: list[int] = strengths.argsort(descending=True)[:count].tolist()
    near = tuple(_near(edited, text, float(strengths[at]), at, max_new_tokens, decision) for at in ranked)
    split = len(found) - len(tokens)
    answers = _text(edited, tokens), _text(edited, before)
    reason = _reason(edited, decision, near)
    report = ExplainReport(prompt, *answers, found[:split], found[split:], near[:nearest], reason)
    if plot is not None:
        plot_tokens(plot, report.prompt_tokens, report.answer_tokens)
    return report


def _answer(edited: EditedModel, text: str, length: int) -> list[int]:
    (answer,) = generate(edited.model, edited.tokenizer, [text], max_new_tokens=length, batch_size=1)
    return list(answer)


def _text(edited: EditedModel, tokens: list[int]) -> str:
    return str(edited.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _tokens(edited: EditedModel, batch: Batch, answer: list[int]) -> tuple[Token, ...]:
    """Return every token with what decided it.

    A token of the answer is decided where the one before it is read; one of the prompt where it is read itself.
    """
    end = batch.start
    prompt = batch.ids[0, : end + 1].tolist()
    decided = edited.choices_of_row(batch)
    memories = edited.routed.memory_of_choice(decided.nearest)
    shown = [*range(len(prompt)), *range(end, end + len(answer))]
    texts = [str(edited.tokenizer.decode([token])) for token in [*prompt, *answer]]
    found = (
        Token(text, float(decided.score_ratio[at]), int(decided.chosen[at]) != UNROUTED, _id(edited, int(memories[at])))
        for text, at in zip(texts, shown, strict=True)
    )
    return tuple(found)


def _near(edited: EditedModel, text: str, strength: float, memory: int, length: int, decision: Decision) -> Near:
    """Return how near an edit was to answering, and the answer the model gives if that edit is forced."""
    with edited.routed.called_with(forced=memory):
        answer = _text(edited, _answer(edited, text, length))
    edit = edited.edit_of(memory)
    if edit is None:
        return Near(f"memory {memory}", None, None, strength, answer)
    found = asked = fits = None
    subjects = getattr(edited.routed, "subject_match", None)
    if decision.subject_matched is not None and subjects is not None:
        named = bool((subjects.name_to_edit == memory).any())
        found = bool(decision.subject_matched[0, memory]) if named else None
    if decision.question_fits is not None and strength > 1 and found is not False:
        fits = bool(decision.question_fits[0, memory])
    refused = found is False or fits is False
    if decision.ask_prob is not None and int(decision.nearest[0]) == memory and strength > 1 and not refused:
        asked = float(decision.ask_prob[0])
    return Near(edit.id, edit.prompt, edit.target, strength, answer, found, asked, fits)


def _reason(edited: EditedModel, decision: Decision, near: tuple[Near, ...]) -> str:
    """Return in a sentence what opened, or which part of the router refused the nearest, and what to do about it."""
    if int(decision.memory[0]) != UNROUTED:
        return _opened(edited, decision)
    if not near:
        return "nothing opened: the memory has no edits"
    edit = near[0]
    if edit.asked is not None:
        return (
            f"stayed shut: the prompt mentions {edit.name} but asks something else ({edit.asked:.2f}, not above "
            f"{MIN_ASK_PROB}), as a task on its text, another time, or a question on a document; if it should answer, "
            "ask it more plainly"
        )
    if edit.strength > 1 and edit.named is False:
        return (
            f"stayed shut: the prompt is like {edit.name}'s but does not name its subject; if it should answer, write "
            "the name as the edit does, or merge with --set subjects=any"
        )
    if edit.fits is False:
        return (
            f"stayed shut: the prompt names the subject of {edit.name}, but its question word asks for another kind of "
            "answer (who, when or how many, where, why); if it should answer, add an edit in these words with the same "
            "target"
        )
    way = "" if edit.prompt is None else ", or add an edit in these words with the same target"
    return (
        f"stayed shut: no score exceeds its threshold, the nearest is {edit.name} at {edit.strength:.2f} of its own; "
        f"if it should answer, ask more like it{way}"
    )


def _opened(edited: EditedModel, decision: Decision) -> str:
    """Return in a sentence which edit opened, or which two, and how surely the prompt asks for it."""
    opened, second = int(decision.memory[0]), UNROUTED if decision.second is None else int(decision.second[0])
    sentence = f"opened {_id(edited, opened) or f'memory {opened}'}"
    if decision.ask_prob is None:
        return sentence
    both, asks = ("", "asks it") if second == UNROUTED else (f" and {_id(edited, second)}", "asks both")
    return f"{sentence}{both}: the prompt {asks} ({float(decision.ask_prob[0]):.2f}, above {MIN_ASK_PROB})"


def _id(edited: EditedModel, memory: int) -> str | None:
    edit = edited.edit_of(memory)
    return None if edit is None else edit.id
