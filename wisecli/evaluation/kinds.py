"""What a model answers where an edit is only mentioned, and where it is asked in other ways; by kind, and generated.

Every edit is put into one prompt of each kind, of the patterns that nothing is learned from.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from wisecli.edits.record import Edit
from wisecli.errors import SettingsError
from wisecli.evaluation.answers import Answer, Answers, targets_of
from wisecli.evaluation.results import Results, is_exact_answer, merge_results, words_of
from wisecli.models.prompts.prompt_kinds import Fact, Kind, kinds

_GROUPS: dict[str, bool | None] = {"all": None, "asked": True, "mentioned": False}
# Every figure over kinds: the share that gets the edit's answer, and of what only mentions it what is as before.
OVER_KINDS = ("asked", "mentioned", "mentioned_unchanged")


@dataclass(frozen=True)
class _KindPrompt:
    """An edit in a prompt of one kind: the ``text`` that the unedited model is asked, and the ``edited`` one."""

    kind: Kind
    place: int
    edit: Edit
    text: str
    edited: str

    @property
    def begun(self) -> str:
        """The answer's first words that the edited model's prompt ends with."""
        return _begun(self.edited, self.edit.answer) if self.kind.begun else ""

    @property
    def rest(self) -> str | None:
        """What is left to answer, if only that is right."""
        return None if self.kind.contains else " ".join(self.edit.answer.split()).removeprefix(self.begun)


def named_kinds(names: str) -> list[Kind]:
    """Return the kinds of ``all``, ``asked``, ``mentioned``, ``none`` or names with commas between.

    Raises:
        SettingsError: there is no kind of a name.
    """
    if names == "none":
        return []
    if names in _GROUPS:
        return [kind for kind in kinds().values() if _GROUPS[names] in (None, kind.asked)]
    known = {kind.label: kind for kind in kinds().values()}
    chosen = [name.strip().replace(" ", "-") for name in names.split(",")]
    if unknown := [name for name in chosen if name not in known]:
        options = ", ".join((*_GROUPS, "none", *known))
        raise SettingsError(f"--kinds: {unknown[0]!r} is unknown; known are {options}")
    return [known[name] for name in dict.fromkeys(chosen)]


def measure_kinds(
    answering: Callable[[int], Answers],
    chosen: Sequence[Kind],
    asked: Sequence[tuple[int, Edit]],
    records: Sequence[Edit],
    *,
    max_new_tokens: int,
    room: int,
) -> Results:
    """Return shares of prompts that get the edit's answer, over all kinds and by kind.

    ``asked`` is better high. ``mentioned`` is better low, and leaves out what the unedited model says, too;
    ``mentioned_unchanged`` is the share of the same prompts whose answer is the unedited model's word for word.

    Args:
        answering: makes answers of at most a given number of tokens.
        asked: the edits that are asked, with their places; those that erase are left out.
        records: all that another name or value may be taken from.
        max_new_tokens: length of an answer; where two are asked for, twice that.
        room: how many tokens a prompt has at most; longer ones are left out.
    """
    parts = []
    for two in (False, True):
        of_length = [kind for kind in chosen if kind.contains == two]
        answers = answering(max_new_tokens * (2 if two else 1))
        parts.append(_measured(answers, list(_kind_prompts(answers, of_length, asked, records, room))))
    values = {name: {**parts[0].get(name, {}), **parts[1].get(name, {})} for name in OVER_KINDS}
    return merge_results(*(_figures(name, by_kind) for name, by_kind in values.items()))


_ByKind = dict[str, dict[int, float]]


def _figures(name: str, by_kind: _ByKind) -> Results:
    """Return the mean over edits of the mean over kinds, and the mean over edits of each kind."""
    found, by_edit = Results(), dict[int, list[float]]()
    for own in by_kind.values():
        for place, value in own.items():
            by_edit.setdefault(place, []).append(value)
    found.add(name, by_edit)
    for label, own in by_kind.items():
        found.figures[f"{name}/{label}"] = statistics.fmean(own.values())
    # `asked` among the samples says how many edits are.
    return replace(found, samples={f"{figure}_prompts": count for figure, count in found.samples.items()})


def _measured(answers: Answers, put: Sequence[_KindPrompt]) -> dict[str, _ByKind]:
    """Ask prompts of all kinds; return values by figure, kind and the edit's place."""
    asked = [prompt for prompt in put if prompt.kind.asked]
    targets = targets_of((prompt.edited, prompt.rest) for prompt in asked)
    after = iter(answers.after([prompt.edited for prompt in asked], stage="answers in all kinds", targets=targets))
    mentioned = [(prompt.edited, prompt.text) for prompt in put if not prompt.kind.asked]
    both = iter(answers.both(mentioned, stage="answers to mentions"))
    found: dict[str, _ByKind] = {}
    for prompt in put:
        values = {"asked": _answered(prompt, next(after))} if prompt.kind.asked else _takes_over(prompt, next(both))
        for name, value in values.items():
            found.setdefault(name, {}).setdefault(prompt.kind.label, {})[prompt.place] = float(value)
    return found


def _answered(prompt: _KindPrompt, answer: Answer) -> bool:
    """Return whether what is asked gets the edit's answer, or the rest of it where it is begun."""
    target = prompt.edit.answer
    if prompt.kind.contains:
        return f" {words_of(target)} " in f" {words_of(answer.text)} "
    return is_exact_answer(Answer(f"{prompt.begun} {answer.text}", answer.ended), target)


def _takes_over(prompt: _KindPrompt, said: tuple[Answer, Answer] | None) -> dict[str, bool]:
    """Return whether the edit's answer is given where it is only mentioned, and whether the answer is as before."""
    if said is None:
        return {"mentioned": False, "mentioned_unchanged": True}
    after, before = said
    taken = _opens_with(after, prompt.edit.answer) and not _opens_with(before, prompt.edit.answer)
    return {"mentioned": taken, "mentioned_unchanged": after.text == before.text}


def _opens_with(answer: Answer, target: str) -> bool:
    """Return whether an answer is the target, however it goes on."""
    return f"{words_of(answer.text)} ".startswith(f"{words_of(target)} ")


def _begun(text: str, target: str) -> str:
    """Return the target's first words that a prompt ends with."""
    words = target.split()
    beginnings = (" ".join(words[:count]) for count in range(len(words) - 1, 0, -1))
    return next(
        (beginning for beginning in beginnings if text.endswith(f" {beginning}") or text.endswith(f"\n{beginning}")), ""
    )


def _kind_prompts(
    answers: Answers, chosen: Sequence[Kind], asked: Sequence[tuple[int, Edit]], records: Sequence[Edit], room: int
) -> Iterator[_KindPrompt]:
    """Yield prompts of every kind that an edit can be put into, in the chat template if there is one."""
    chat, tokenizer = bool(answers.tokenizer.chat_template), answers.tokenizer
    given = [(place, edit) for place, edit in asked if not edit.erased]
    for number, (place, edit) in enumerate(given):
        fact = _fact(edit, records, given[number - 1][1])
        for kind in chosen:
            turns = kind.sample_turns(fact, trained=False, rng=random.Random(f"{kind.name}\n{edit.prompt}"), chat=chat)
            if turns is None:
                continue
            text = kind.render_turns(tokenizer, turns, chat=chat)
            edited = kind.render_turns(tokenizer, _reworded(answers, turns), chat=chat)
            if max(len(tokenizer(whole)["input_ids"]) for whole in {text, edited}) <= room:
                yield _KindPrompt(kind, place, edit, text, edited)


def _reworded(answers: Answers, turns: Sequence[str]) -> list[str]:
    """Return turns of which the user's last is what a method that rewords makes of it."""
    last = (len(turns) - 1) // 2 * 2
    return [answers.reworded(turn) if place == last else turn for place, turn in enumerate(turns)]


def _fact(edit: Edit, records: Sequence[Edit], second: Edit) -> Fact:
    """Return an edit as a fact, with another value and name from records of a like question, if there are any."""
    rng = random.Random(edit.prompt)
    others = [record for record in records if not record.erased and words_of(record.answer) != words_of(edit.answer)]
    named = [record for record in records if _is_other(record.subject_name, edit.subject_name)]
    other, name = (_similar_record(edit, records_of_kind, rng) for records_of_kind in (others, named))
    return Fact(
        edit.prompt,
        edit.subject_name,
        edit.answer,
        other=other.answer if other else None,
        namesake=name.subject_name if name else None,
        second=None if second is edit else Fact(second.prompt, second.subject_name, second.answer),
    )


def _is_other(name: str | None, subject: str | None) -> bool:
    return bool(name and subject) and str(name) not in str(subject) and str(subject) not in str(name)


def _similar_record(edit: Edit, records: Sequence[Edit], rng: random.Random) -> Edit | None:
    """Return one of the records, whose prompt begins like the edit's if any does."""
    alike = [record for record in records if record.prompt.split(" ")[:1] == edit.prompt.split(" ")[:1]]
    return rng.choice(alike or records) if records else None
