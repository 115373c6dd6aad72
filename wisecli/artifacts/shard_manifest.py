"""``shards.json``: what a directory of shards is about, and the way back to its base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from wisecli.artifacts import file_names
from wisecli.artifacts.memory_manifest import Base, Made, Origin
from wisecli.artifacts.shard import MaskKind, Shard, load_shard, shard_rows, shard_sizes
from wisecli.artifacts.tensor_schema import require_layout
from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError, MismatchedShardsError, WrongDirectoryError
from wisecli.io.checkpoint import load_tensors, read_json, write_json
from wisecli.io.digest import sha256_file
from wisecli.io.json_schema import CLOSED, OPEN, decode
from wisecli.io.safe_paths import inside
from wisecli.models.layout.site import Fingerprint, Site, StoredSite, check_site
from wisecli.routing.memories.subject_tensors import Spellings

if TYPE_CHECKING:
    from torch import Tensor

    from wisecli.artifacts.background_stats import BackgroundStats

MANIFEST_NAME = file_names.SHARDS
UNRELATED_NAME = "unrelated.safetensors"
PLAN_NAME = "plan.json"
SCHEMA, FORMER_SCHEMA, PLAN_SCHEMA = "wise.shards/3", "wise.shards/2", "wise.plan/1"
# Lighter penalties leave nothing to solve with.
_LIGHTEST = 1e-9
_Token = Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest lists it; ``losses`` holds the mean loss after every pass of training or polish.

    ``penalty`` is λ and w of the closed form, where it was used. ``untaken`` names the edits of whose target some token
    is not the arg-max after the bare prompt. ``solved`` says whether its file has the matrix' values; if not, they are
    solved for when shards are merged into matrices.
    """

    __pydantic_config__ = CLOSED

    file: str
    sha256: str
    mask_kind: MaskKind
    edits: tuple[str, ...]
    losses: tuple[float, ...]
    seconds: float
    penalty: tuple[float, float] | None = None
    untaken: tuple[str, ...] = ()
    solved: bool = True


@dataclass(frozen=True)
class ShardDirectory:
    """Everything ``shards.json`` says; ``settings`` are those the shards were written with.

    ``left_out`` names the edits that no shard holds, as the model gives nothing finite for them. ``paraphrases`` are
    further prompts that the model wrote, by the edit's id, as ``subjects`` are the words of those that prompts name,
    and ``subject_tokens`` the tokens that those are written with, in order. ``separator_token_id`` is the token between
    two answers, if edits answer in pairs.
    ``known`` are edits that were asked for and left out, as the model said them already, if such were to be left out.
    ``files_checked`` says whether the files were held against their digests already, and need not be again.
    """

    path: Path
    model: str
    revision: str | None
    fingerprint: Fingerprint
    site: Site
    settings: dict[str, Any]
    contexts: tuple[str, ...]
    edits: tuple[Edit, ...]
    shards: tuple[ShardEntry, ...]
    unrelated_sha256: str
    versions: dict[str, str]
    made: Made
    left_out: tuple[str, ...] = ()
    paraphrases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    subjects: dict[str, Spellings] = field(default_factory=dict)
    known: tuple[Edit, ...] | None = None
    subject_tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    separator_token_id: int | None = None
    files_checked: bool = False

    @property
    def written(self) -> tuple[Edit, ...]:
        """The edits that shards hold, in order."""
        gone = set(self.left_out)
        return tuple(edit for edit in self.edits if edit.id not in gone)

    def load(self, entry: ShardEntry) -> Shard:
        """Read one shard file, checking its digest."""
        path = inside(self.path, entry.file)
        listed = len(self.edits)
        return load_shard(path, self.site, entry.mask_kind, entry.sha256, edits=listed, solved=entry.solved)

    def tensors(self, entry: ShardEntry, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Return some of the tensors of one shard file, as they are stored, checking its digest unless that was done.

        Args:
            wanted: whether a tensor of that name is wanted.
        """
        path = inside(self.path, entry.file)
        found = load_tensors(path, digest=None if self.files_checked else entry.sha256, wanted=wanted)
        rows = shard_rows(entry.mask_kind, found, solved=entry.solved)
        sizes = shard_sizes(self.site, len(self.edits))
        require_layout(path, found, {name: row for name, row in rows.items() if wanted(name)}, sizes)
        return found

    def load_unrelated(self) -> BackgroundStats:
        """Read the statistics of unrelated text, checking their digest."""
        from wisecli.artifacts.background_stats import load_background

        return load_background(inside(self.path, UNRELATED_NAME), self.unrelated_sha256, d_ff=self.site.width)


@dataclass(frozen=True)
class _Settings:
    """Those settings that merging goes by."""

    __pydantic_config__ = OPEN

    writer: Literal["solve", "gradient"]
    threshold: Literal["false-alarm", "minimum"]


@dataclass(frozen=True)
class _Unrelated:
    __pydantic_config__ = OPEN

    sha256: str


@dataclass(frozen=True)
class _Content:
    """``shards.json`` as it is written."""

    __pydantic_config__ = OPEN

    base: Base
    site: StoredSite
    settings: dict[str, Any]
    contexts: tuple[str, ...]
    edits: tuple[Edit, ...]
    shards: tuple[ShardEntry, ...]
    unrelated: _Unrelated
    versions: dict[str, str]
    made: Made
    left_out: tuple[str, ...]
    paraphrases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    subjects: dict[str, Spellings] = field(default_factory=dict)
    known: tuple[Edit, ...] | None = None
    subject_tokens: dict[str, tuple[_Token, ...]] = field(default_factory=dict)
    separator_token_id: _Token | None = None

    def check(self, *, plan: bool) -> None:
        """Check what types do not say: that the parts belong together.

        Args:
            plan: whether no shard is there yet.

        Raises:
            ValueError: saying which do not.
        """
        check_site(self.site)
        decode(_Settings, self.settings, "settings")
        known = [edit.id for edit in self.edits]
        dealt = [*self.left_out, *(name for entry in self.shards for name in entry.edits)]
        if len(set(known)) != len(known) or not known or (plan and dealt):
            raise ValueError("`edits` are none, or one is there twice")
        if not plan and (sorted(known) != sorted(dealt) or len(dealt) == len(self.left_out)):
            raise ValueError("`edits` and the edits of `shards` do not agree")
        for ridge, unrelated in (entry.penalty for entry in self.shards if entry.penalty is not None):
            if not (_LIGHTEST <= ridge <= 1 / _LIGHTEST and 0 <= unrelated <= 1 / _LIGHTEST):
                raise ValueError(f"`penalty` is {ridge:g} and {unrelated:g}")


def write_shard_directory(directory: ShardDirectory) -> None:
    """Write ``shards.json`` beside the shard files, or, as long as there are none, ``plan.json``."""
    plan = not directory.shards
    content = {
        "schema": PLAN_SCHEMA if plan else SCHEMA,
        "base": {"model": directory.model, "revision": directory.revision, **directory.fingerprint.as_dict()},
        "site": directory.site.as_dict(),
        "settings": directory.settings,
        "contexts": list(directory.contexts),
        "edits": [edit.as_dict() for edit in directory.edits],
        "shards": [asdict(entry) for entry in directory.shards],
        "unrelated": {"file": UNRELATED_NAME, "sha256": directory.unrelated_sha256},
        "versions": directory.versions,
        "made": asdict(directory.made),
        "left_out": list(directory.left_out),
        "paraphrases": {name: list(texts) for name, texts in directory.paraphrases.items()},
        "subjects": {
            name: [[asdict(word) for word in words] for words in own] for name, own in directory.subjects.items()
        },
        "subject_tokens": {name: list(tokens) for name, tokens in directory.subject_tokens.items()},
        "separator_token_id": directory.separator_token_id,
        "known": None if directory.known is None else [edit.as_dict() for edit in directory.known],
    }
    write_json(directory.path / (PLAN_NAME if plan else MANIFEST_NAME), content)


def read_shard_directory(path: Path, *, plan: bool = False) -> ShardDirectory:
    """Read ``shards.json``, or the ``plan`` for shards that are still to be written.

    Raises:
        DamagedFileError: it is missing or not what ``wise edit`` writes.
    """
    file = path / (PLAN_NAME if plan else MANIFEST_NAME)
    schemas = (PLAN_SCHEMA,) if plan else (SCHEMA, FORMER_SCHEMA)
    if not file.is_file():
        wanted = f"a directory with {file.name}, which `wise edit` writes"
        raise WrongDirectoryError(path, file_names.what_is_at(path), wanted)
    content = read_json(file)
    if content.get("schema") not in schemas:
        raise DamagedFileError(file, f"its schema is not {schemas[0]}", "edit anew with this version")
    try:
        read = decode(_Content, content)
        read.check(plan=plan)
    except ValueError as error:
        raise DamagedFileError(file, f"an entry is missing or wrong ({error})", "edit anew") from None
    base, alike = read.base, _Content.__dataclass_fields__.keys() & ShardDirectory.__dataclass_fields__.keys()
    return ShardDirectory(
        path,
        base.model,
        base.revision,
        base.fingerprint,
        unrelated_sha256=read.unrelated.sha256,
        **{name: getattr(read, name) for name in alike},
    )


def origin_of(directory: ShardDirectory) -> Origin:
    """Return what a memory remembers of the shards it was merged from."""
    gone = set(directory.left_out)
    return Origin(
        str(directory.path),
        directory.settings,
        directory.made,
        tuple(edit.id for edit in directory.edits),
        tuple(edit for edit in directory.edits if edit.id in gone),
        tuple(entry.sha256 for entry in directory.shards),
        directory.versions,
        sha256_file(directory.path / MANIFEST_NAME),
    )


def require_same_site(directories: Sequence[ShardDirectory]) -> None:
    """Check that shards of several directories change the same matrix of the same model.

    Raises:
        MismatchedShardsError: naming the two that differ.
    """
    first = directories[0]
    for other in directories[1:]:
        if other.fingerprint.matrix != first.fingerprint.matrix or other.site != first.site:
            raise MismatchedShardsError(
                f"{first.path} edits layer {first.site.layer} and {other.path} layer {other.site.layer}, or of "
                "different models; merge only shards of one matrix of one model"
            )
    ids = [edit.id for directory in directories for edit in directory.written]
    counts = Counter(ids)
    twice = next((name for name in ids if counts[name] > 1), None)
    if twice is not None:
        raise MismatchedShardsError(f"edit {twice!r} is in more than one of the shards; merge it only once")
