"""What stands before training: a file of edits is verified, held against a policy, and freed of conflicts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wisecli.edits.checks.conflicts import Conflict, OnConflict, find, giving_way, outranked, resolve
from wisecli.edits.reading.flatten_records import Notices
from wisecli.edits.reading.record_files import content_of
from wisecli.edits.record import Edit, Numbered, numbered_edits
from wisecli.errors import ConflictError
from wisecli.progress import NOTE, Event, ProgressCallback, ignore_progress

if TYPE_CHECKING:
    from wisecli.edits.checks.policy import Policy
    from wisecli.edits.checks.signatures import Signed


@dataclass(frozen=True)
class Sheet:
    """Edits as a file has them, each with its line; the file's name, and the digest of its bytes.

    ``passed_over`` has a sentence for each field that nothing reads or that was no text, ``taken`` one for each layout
    of others: what was taken from which fields.
    """

    name: str
    sha256: str
    numbered: tuple[Numbered, ...]
    passed_over: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """An edit that is not trained, its line, and why."""

    id: str
    line: int
    reason: str


@dataclass(frozen=True)
class AdmissionReport:
    """The edits that admission left out, and its warnings.

    ``known`` are edits whose targets the unedited model gives already, ``dropped`` those that gave way to others.
    ``conflicts`` has a sentence on each conflict that keeps nothing from being trained.
    """

    known: tuple[LeftOut, ...] = ()
    dropped: tuple[LeftOut, ...] = ()
    conflicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Admitted:
    """Edits that may be trained, with their lines.

    ``superseded`` maps ids of edits that a memory holds to the ids of those that take their places.
    """

    numbered: tuple[Numbered, ...]
    sifted: AdmissionReport = field(default_factory=AdmissionReport)
    superseded: dict[str, str] = field(default_factory=dict)

    @cached_property
    def edits(self) -> tuple[Edit, ...]:
        """The edits alone."""
        return tuple(edit for _, edit in self.numbered)

    def without(self, known: frozenset[int]) -> Admitted:
        """Return the admitted edits but for those at the indices ``known``, whose targets the model gives already."""
        gone = tuple(
            LeftOut(edit.id, line, "the model says so already")
            for order, (line, edit) in enumerate(self.numbered)
            if order in known
        )
        left = tuple(pair for order, pair in enumerate(self.numbered) if order not in known)
        return replace(self, numbered=left, sifted=replace(self.sifted, known=gone))


@dataclass(frozen=True)
class Admission:
    """What is asked of edits before they are trained.

    Args:
        on_conflict: ``error`` refuses edits that cannot all hold, ``latest`` and ``skip`` leave some of them out (see
            :func:`wisecli.edits.checks.conflicts.resolve`), and ``keep`` looks for none. By default edits are refused
            only if
            their prompts are in conflict: those that meet in a rephrase are told of, and those of a memory give way.
        policy: rules that they must keep.
        signed: a signature that must hold for the file.
        skip_known: whether to leave out edits whose targets the unedited model gives already.
        derive: whether to add what follows from the edits by rule (see :mod:`wisecli.edits.derivation`).
        allow_special: whether tokens that steer the model, as those that end a turn, may stand in prompts and targets.
    """

    on_conflict: OnConflict | Literal["keep"] | None = None
    policy: Policy | None = None
    signed: Signed | None = None
    skip_known: bool = False
    allow_special: bool = False
    derive: bool = False

    def read(self, path: Path, *, name: str | None = None) -> Sheet:
        """Read a file of edits, once: what is parsed is what the signature was checked for.

        Args:
            name: what to call the file.

        Raises:
            SignatureError: the signature does not hold; nothing of the file was parsed.
            EditFileError: naming the line, if a record cannot be used.
        """
        return self.parse(path, content_of(path), name=name)

    def parse(self, path: Path, content: bytes, *, name: str | None = None) -> Sheet:
        """Return the same of a file's content, which may have come through a pipe."""
        if self.signed is not None:
            self.signed.require(path, content)
        notices = Notices(str(path))
        repeated = self.on_conflict in ("latest", "skip")
        numbered = tuple(numbered_edits(path, content, notices=notices, repeated=repeated))
        digest, warnings = hashlib.sha256(content).hexdigest(), tuple(notices.warnings())
        return Sheet(name or str(path), digest, numbered, warnings, tuple(notices.taken()))

    def admit(
        self,
        name: str,
        numbered: Sequence[Numbered],
        *,
        held: Sequence[Edit] = (),
        on_progress: ProgressCallback = ignore_progress,
    ) -> Admitted:
        """Hold edits against the policy, and resolve their conflicts; before that, add what follows if it is asked for.

        Args:
            name: the name of the file that they are from.
            held: edits of the memory that they will be joined with, the oldest first. What is among them just as it is
                has a say in conflicts, but is not trained again.

        Raises:
            PolicyError: a rule is broken.
            ConflictError: edits are in conflict, and nothing says which of them counts.
        """
        already = set(held)
        if self.derive:
            from wisecli.edits.derivation import with_derived

            numbered = with_derived(numbered)
        if self.policy is not None:
            self.policy.check(name, [pair for pair in numbered if pair[1] not in already])
        if self.on_conflict == "keep":
            return Admitted(tuple(pair for pair in numbered if pair[1] not in already))
        first, orphans = _without_orphans(numbered, held, "neither in the file nor in the memory")
        overruled = {entry.order: reason for entry, reason in outranked(first, name, held=held)}
        kept = [pair for order, pair in enumerate(first) if order not in overruled]
        admitted = _resolved(self.on_conflict, name, kept, held, on_progress)
        outdone = []
        for (line, edit), why in ((first[order], why) for order, why in overruled.items()):
            outdone.append(LeftOut(edit.id, line, why))
            if edit.derived is None:
                on_progress(Event(NOTE, note=f"warning: {name}:{line}: consequence {edit.id!r} is left out: {why}"))
        admitted = _with_edits(admitted, held, (*orphans, *outdone))
        return replace(admitted, numbered=tuple(pair for pair in admitted.numbered if pair[1] not in already))


DEFAULT_ADMISSION = Admission()
# Of a benchmark everything is edited, whatever its records say of each other.
NO_CHECKS = Admission(on_conflict="keep")


def _without_orphans(
    numbered: Sequence[Numbered], held: Sequence[Edit], where: str
) -> tuple[tuple[Numbered, ...], tuple[LeftOut, ...]]:
    """Return edits without consequences whose edit is missing, and those; ``where`` says where it is missing."""
    ids = {None, *(edit.id for edit in held), *(edit.id for _, edit in numbered)}
    left = tuple(pair for pair in numbered if pair[1].consequence_of in ids)
    orphans = [(line, edit) for line, edit in numbered if edit.consequence_of not in ids]
    whys = (LeftOut(edit.id, line, f"its edit {edit.consequence_of!r} is {where}") for line, edit in orphans)
    return left, tuple(whys)


def _with_edits(admitted: Admitted, held: Sequence[Edit], dropped: Sequence[LeftOut]) -> Admitted:
    """Return the admitted edits without consequences of edits that were not admitted.

    Args:
        dropped: consequences that were left out before.
    """
    left, bereft = _without_orphans(admitted.numbered, held, "left out")
    ids = {edit.id for _, edit in left}
    whole = sorted((*admitted.sifted.dropped, *dropped, *bereft), key=lambda drop: drop.line)
    superseded = {old: new for old, new in admitted.superseded.items() if new in ids}
    return Admitted(left, replace(admitted.sifted, dropped=tuple(whole)), superseded)


def _resolved(
    on_conflict: OnConflict | None,
    name: str,
    numbered: Sequence[Numbered],
    held: Sequence[Edit],
    on_progress: ProgressCallback,
) -> Admitted:
    """Return the edits that go on, once conflicts are refused or settled as asked."""
    if on_conflict is None:
        return _default(name, numbered, held, on_progress)
    if on_conflict == "error":
        _refuse(name, find(numbered, held=held))
        return Admitted(tuple(numbered))
    resolution = resolve(numbered, held=held, on_conflict=on_conflict)
    dropped = [(drop.entry, drop.reason(name)) for drop in resolution.dropped]
    left_out = tuple(LeftOut(entry.edit.id, entry.line or 0, reason) for entry, reason in dropped)
    return Admitted(resolution.kept, AdmissionReport(dropped=left_out), resolution.superseded)


def _default(name: str, numbered: Sequence[Numbered], held: Sequence[Edit], on_progress: ProgressCallback) -> Admitted:
    """Admit edits by the default rule: prompts must not contradict each other, and later edits replace held ones."""
    conflicts = find(numbered)
    _refuse(name, [conflict for conflict in conflicts if not conflict.rephrase])
    sentences = tuple(conflict.sentence(name) for conflict in conflicts)
    if sentences:
        more = f", and {len(sentences) - 1} more like it" if sentences[1:] else ""
        on_progress(Event(NOTE, note=f"{sentences[0]}{more}; both are trained, choose with --on-conflict"))
    return Admitted(tuple(numbered), AdmissionReport(conflicts=sentences), giving_way(numbered, held, rephrases=False))


def _refuse(name: str, conflicts: Sequence[Conflict]) -> None:
    if conflicts:
        raise ConflictError(name, [conflict.sentence(name) for conflict in conflicts])
