"""Edits that cannot all hold: duplicates, contradictions and cycles, found before anything is trained.

Two edits are of the same fact if their prompts are the same, if they have the same subject and their prompts are the
same but for punctuation once the subject is replaced by a blank, or if one's prompt is a rephrase of the other's.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from wisecli.edits.record import Edit, Numbered
from wisecli.edits.text import folded
from wisecli.io.json_schema import shown

OnConflict = Literal["error", "latest", "skip"]
Kind = Literal["duplicate", "contradiction", "cycle"]
# A way to recognise a fact, and under it edits by their target, in the order in which targets were last given.
_Name = tuple[str, ...]
_Given = dict[str, list["Entry"]]

# The blank of a subject; some prompts are written with it.
_BLANK = "{}"
_PUNCTUATION = ".,:;?!\"'’“”…"
_IN_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Entry:
    """An edit, and the line that it is in; ``None`` where a memory holds it. Earlier edits have a lower ``order``."""

    edit: Edit
    line: int | None
    order: int

    def named(self, file: str) -> str:
        """Return the edit's id and where it is."""
        return f"{self.edit.id!r} " + ("in the memory" if self.line is None else f"at {file}:{self.line}")


@dataclass(frozen=True)
class Conflict:
    """Two edits of one fact that cannot both hold, or say the same twice.

    Of a cycle, ``first`` already said what ``later`` says, before ``earlier`` replaced it. ``rephrase`` says that they
    meet in a rephrase only: rephrases are not trained, so both can be.
    """

    kind: Kind
    earlier: Entry
    later: Entry
    first: Entry | None = None
    rephrase: bool = False

    def sentence(self, file: str) -> str:
        """Return what is wrong, with both places.

        Args:
            file: the name of the file that the lines are of.
        """
        edit, earlier = self.later.edit, self.earlier.named(file)
        start = f"{file}:{self.later.line}: edit {edit.id!r}"
        if self.kind == "duplicate":
            return f"{start} says the same as {earlier}"
        if self.first is not None:
            first = self.first.named(file)
            return f"{start} goes back to {shown(edit.target)}, which {first} said before {earlier} replaced it"
        where = "a rephrase of the same prompt" if self.rephrase else "the same prompt"
        other = shown(self.earlier.edit.target)
        return f"{start} answers {shown(edit.target)} to {where}, where {earlier} answers {other}"


@dataclass(frozen=True)
class Dropped:
    """An edit that is left out, and the one that stands in its place."""

    entry: Entry
    by: Entry
    duplicate: bool

    def reason(self, file: str) -> str:
        """Return why it is left out."""
        return ("it says the same as " if self.duplicate else "it contradicts ") + self.by.named(file)


@dataclass(frozen=True)
class Resolution:
    """What is left of edits, in their order, once conflicts are resolved.

    ``superseded`` maps ids of edits that a memory holds to the ids of those that take their places.
    """

    kept: tuple[Numbered, ...]
    dropped: tuple[Dropped, ...]
    superseded: dict[str, str]


def find(numbered: Sequence[Numbered], *, held: Sequence[Edit] = ()) -> list[Conflict]:
    """Return every edit that is in conflict with an earlier one, each once: with the newest that says otherwise.

    Args:
        numbered: edits with their lines.
        held: edits of a memory, the oldest first; they come before all others.
    """
    facts, found = _Facts(_held(held)), []
    for entry in _placed(numbered):
        conflict = facts.conflict(entry)
        if conflict is not None:
            found.append(conflict)
        facts.add(entry)
    return found


def resolve(
    numbered: Sequence[Numbered], *, held: Sequence[Edit] = (), on_conflict: Literal["latest", "skip"]
) -> Resolution:
    """Leave out edits until none is in conflict with another.

    Args:
        held: edits of a memory, the oldest first.
        on_conflict: ``latest`` lets later edits take the places of earlier ones, those of the memory too, and leaves
            out what says the same as the memory; ``skip`` leaves out whatever is in conflict with an earlier edit.
    """
    latest = on_conflict == "latest"
    entries = list(_placed(numbered))
    facts, kept, dropped = _Facts(() if latest else _held(held)), [], []
    for entry in reversed(entries) if latest else entries:
        conflict = facts.conflict(entry)
        if conflict is None:
            facts.add(entry)
            kept.append(entry)
        else:
            dropped.append(Dropped(entry, conflict.earlier, conflict.kind == "duplicate"))
    superseded = _superseding(kept, held, rephrases=True) if latest else {}
    replacing = set(superseded.values())
    left = _Facts(entry for entry in _held(held) if entry.edit.id not in superseded)
    for entry in kept if latest else ():
        twins = list(left.twins(entry))
        if entry.edit.id in replacing:
            superseded |= {twin.edit.id: entry.edit.id for twin in twins}
        elif twins:
            dropped.append(Dropped(entry, twins[0], duplicate=True))
    gone = {drop.entry.order for drop in dropped}
    return Resolution(
        tuple(numbered[entry.order] for entry in entries if entry.order not in gone),
        tuple(sorted(dropped, key=lambda drop: drop.entry.order)),
        superseded,
    )


def giving_way(numbered: Sequence[Numbered], held: Sequence[Edit], *, rephrases: bool = True) -> dict[str, str]:
    """Return the ids of held edits that new ones contradict, with the new ones' ids.

    Args:
        rephrases: whether edits that meet in a rephrase only are of the same fact.
    """
    return _superseding(_placed(numbered), held, rephrases=rephrases)


def outranked(numbered: Sequence[Numbered], file: str, *, held: Sequence[Edit] = ()) -> list[tuple[Entry, str]]:
    """Return the consequences that give way to stated edits, each with the reason.

    An edit outranks every consequence; stated consequences, and what a memory holds, outrank those that are derived.

    Args:
        file: the name of the file that the lines are of.
        held: edits of a memory, the oldest first.
    """
    placed = list(_placed(numbered))
    asked = [entry for entry in placed if entry.edit.consequence_of is None]
    stated = [entry for entry in placed if entry.edit.consequence_of is not None and entry.edit.derived is None]
    derived = [entry for entry in placed if entry.edit.derived is not None]
    if not stated and not derived:
        return []
    leaving = {entry.edit.id for entry in asked} | _superseding(asked, held, rephrases=False).keys()
    staying = [entry for entry in _held(held) if not leaving & {entry.edit.id, entry.edit.consequence_of}]
    edits = [*(entry for entry in staying if entry.edit.consequence_of is None), *asked]
    found = list(_overruled(stated, edits, file))
    gone = {entry.order for entry, _ in found}
    others = [*staying, *asked, *(entry for entry in stated if entry.order not in gone)]
    return [*found, *_overruled(derived, others, file)]


def _overruled(entries: Sequence[Entry], certain: Sequence[Entry], file: str) -> Iterator[tuple[Entry, str]]:
    """Yield derived consequences that certain edits contradict or name, and the reason for each."""
    if not entries:
        return
    facts, by_id = _Facts(certain), {entry.edit.id: entry for entry in certain}
    for entry in entries:
        conflict = facts.conflict(entry)
        if (namesake := by_id.get(entry.edit.id)) is not None:
            yield entry, f"its id is that of {namesake.named(file)}"
        elif conflict is not None:
            yield entry, Dropped(entry, conflict.earlier, conflict.kind == "duplicate").reason(file)


def _superseding(new: Iterable[Entry], held: Sequence[Edit], *, rephrases: bool) -> dict[str, str]:
    facts = _Facts(_held(held))
    return {old.edit.id: entry.edit.id for entry in new for old in facts.contradicted(entry, rephrases=rephrases)}


def _held(held: Sequence[Edit]) -> Iterator[Entry]:
    return (Entry(edit, None, order - len(held)) for order, edit in enumerate(held))


def _placed(numbered: Sequence[Numbered]) -> Iterator[Entry]:
    return (Entry(edit, line, order) for order, (line, edit) in enumerate(numbered))


class _Facts:
    """Edits by all that their facts can be recognised by."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._given: dict[_Name, _Given] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Let an edit be found."""
        target = _target(entry.edit)
        names = [*_names(entry.edit), *(("rephrase", text) for text in _rephrases(entry.edit))]
        for name in names:
            given = self._given.setdefault(name, {})
            entries = given.pop(target, [])
            entries.append(entry)
            given[target] = entries

    def conflict(self, entry: Entry) -> Conflict | None:
        """Return the conflict of an edit with those that were added, if there is one."""
        target, by_order = _target(entry.edit), attrgetter("order")
        for rephrase, near in ((False, self._near(_names(entry.edit))), (True, self._near(_rephrased(entry.edit)))):
            others = [_newest(given, target) for given in near]
            earlier = max((other for other in others if other is not None), key=by_order, default=None)
            if earlier is not None:
                same = [given[target][0] for given in near if target in given]
                first = min((twin for twin in same if twin.order < earlier.order), key=by_order, default=None)
                return Conflict("cycle" if first else "contradiction", earlier, entry, first, rephrase)
            if not rephrase and (twin := next(self.twins(entry), None)) is not None:
                return Conflict("duplicate", twin, entry)
        return None

    def twins(self, entry: Entry) -> Iterator[Entry]:
        """Yield edits with the same prompt and target, newest first, but none that is held by the same id."""
        given = self._given.get(("prompt", folded(entry.edit.prompt)), {}).get(_target(entry.edit), [])
        return (other for other in reversed(given) if other.line is not None or other.edit.id != entry.edit.id)

    def contradicted(self, entry: Entry, *, rephrases: bool) -> Iterator[Entry]:
        """Yield the known edits of the same fact with another target."""
        names = [*_names(entry.edit), *(_rephrased(entry.edit) if rephrases else ())]
        for given in self._near(names):
            for target, entries in given.items():
                if target != _target(entry.edit):
                    yield from entries

    def _near(self, names: Iterable[_Name]) -> list[_Given]:
        return [self._given[name] for name in names if name in self._given]


def _newest(given: _Given, target: str) -> Entry | None:
    """Return the newest edit with another target."""
    other = next((asked for asked in reversed(given) if asked != target), None)
    return None if other is None else given[other][-1]


def _target(edit: Edit) -> str:
    said = " ".join(edit.answer.split())
    return f"anything but {said}" if edit.erased else said


def _rephrases(edit: Edit) -> Iterator[str]:
    return map(folded, edit.rephrases)


def _names(edit: Edit) -> Iterator[_Name]:
    """Yield keys under which prompts of the same fact are found."""
    prompt = folded(edit.prompt)
    yield "prompt", prompt
    if subject := folded(edit.subject or ""):
        blanked = _blanked(prompt, subject)
        words = (word.strip(_PUNCTUATION) for word in blanked.split())
        yield "subject", subject, " ".join(word for word in words if word)


def _blanked(prompt: str, subject: str) -> str:
    """Return a prompt with a blank wherever its subject stands as words of its own."""
    before, found, behind = prompt.partition(subject)
    if found and subject in prompt[len(before) + 1 :]:  # of few prompts, as to compile a pattern takes long
        return re.sub(rf"(?<!\w){re.escape(subject)}(?!\w)", _BLANK, prompt)
    alone = found and not (_IN_WORD.match(before[-1:]) or _IN_WORD.match(behind))
    return before + _BLANK + behind if alone else prompt


def _rephrased(edit: Edit) -> Iterator[_Name]:
    """Yield the names of edits that share a prompt with this one by a rephrase of either."""
    yield "rephrase", folded(edit.prompt)
    for text in _rephrases(edit):
        yield "prompt", text
