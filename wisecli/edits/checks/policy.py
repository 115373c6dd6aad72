"""``policy.toml``: what may be edited at all, checked before anything is trained."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wisecli.data.packaged import tomllib
from wisecli.edits.record import PROVENANCE, Edit, Numbered
from wisecli.edits.text import folded
from wisecli.errors import PolicyError, SettingsError
from wisecli.io.json_schema import CLOSED, decode, shown


@dataclass(frozen=True)
class _Content:
    """``policy.toml`` as it is written."""

    __pydantic_config__ = CLOSED

    forbidden_subjects: tuple[str, ...] = ()
    forbidden_patterns: tuple[str, ...] = ()
    maximum_edits: int | None = None
    require: tuple[Literal["who", "when", "source"], ...] = ()
    allowed_operations: tuple[Literal["insert", "modify", "erase"], ...] | None = None


@dataclass(frozen=True)
class Policy:
    """Rules that every edit of a run must keep.

    ``subjects`` are the forbidden ones with what finds them, ``patterns`` are looked for in prompt, target and
    rephrases. What is ``None`` is no rule.
    """

    path: Path
    subjects: tuple[tuple[str, re.Pattern[str]], ...]
    patterns: tuple[re.Pattern[str], ...]
    maximum_edits: int | None
    require: tuple[str, ...]
    operations: tuple[str, ...] | None

    def check(self, file: str, numbered: Sequence[Numbered]) -> None:
        """Check edits with their lines.

        Args:
            file: the name of the file that the lines are of.

        Raises:
            PolicyError: with a sentence for every rule that is broken, naming the line.
        """
        broken = [f"{file}:{line}: {what}" for line, edit in numbered for what in self._broken(edit)]
        if self.maximum_edits is not None and len(numbered) > self.maximum_edits:
            broken.append(f"{file}: {len(numbered)} edits, of which maximum_edits allows {self.maximum_edits} a run")
        if broken:
            raise PolicyError(file, self.path, broken)

    def _broken(self, edit: Edit) -> Iterator[str]:
        """Yield a sentence for each rule that an edit breaks."""
        start = f"edit {edit.id!r}"
        texts = [folded(edit.prompt), folded(edit.subject or "")]
        for subject, pattern in self.subjects:
            if any(map(pattern.search, texts)):
                yield f"{start} is about {shown(subject)}, which forbidden_subjects names"
        for pattern in self.patterns:
            found = next(filter(None, map(pattern.search, (edit.prompt, edit.target, *edit.rephrases))), None)
            if found is not None:
                yield f"{start} says {shown(found[0])}, which forbidden_patterns forbid by {shown(pattern.pattern)}"
        for name in self.require:
            if not (getattr(edit, name) or "").strip():
                yield f"{start} does not say `{name}`, which require asks for"
        if self.operations is not None and edit.op not in self.operations:
            yield f"{start} is to {edit.op}, which allowed_operations does not name"


def read_policy(path: Path) -> Policy:
    """Read and check a policy.

    Raises:
        SettingsError: it cannot be read, has a key that is unknown, or a pattern that is none.
    """
    try:
        content = decode(_Content, tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise SettingsError(f"{path}: not readable ({error}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: no policy ({error})") from None
    blank = next((subject for subject in content.forbidden_subjects if not folded(subject)), None)
    if blank is not None or (content.maximum_edits or 0) < 0:
        raise SettingsError(f"{path}: forbidden_subjects must not be blank, nor maximum_edits below 0")
    return Policy(
        path,
        tuple((subject, _words(subject)) for subject in content.forbidden_subjects),
        tuple(_compiled(path, pattern) for pattern in content.forbidden_patterns),
        content.maximum_edits,
        tuple(name for name in PROVENANCE if name in content.require),
        content.allowed_operations,
    )


def _words(subject: str) -> re.Pattern[str]:
    """Return what finds a subject as whole words."""
    return re.compile(rf"(?<!\w){re.escape(folded(subject))}(?!\w)")


def _compiled(path: Path, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise SettingsError(f"{path}: forbidden_patterns has {shown(pattern)}, which is no pattern ({error})") from None
