"""``wise inspect``: what shards, a memory or an exported checkpoint hold, from manifests and headers alone."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wisecli.artifacts.directory_kind import Kind, holds_merged, kind_of
from wisecli.artifacts.file_names import MEMORY_TENSORS, MERGED
from wisecli.artifacts.former_names import current_name
from wisecli.artifacts.memory_manifest import MemoryEntry, MemoryManifest, read_manifest
from wisecli.artifacts.shard_manifest import ShardDirectory, ShardEntry, read_shard_directory
from wisecli.commands.checkpoint.plot import plot_scores
from wisecli.edits.record import Edit, consequences_in
from wisecli.errors import ModelError, OutputExistsError, SettingsError
from wisecli.export.stock.stock_manifest import StockManifest, figures_of, read_stock
from wisecli.io.checkpoint import read_json
from wisecli.io.consistent_read import read_consistently
from wisecli.io.safe_paths import inside
from wisecli.io.safetensors_header import Header, read_header


@dataclass(frozen=True)
class InspectReport:
    """What a directory holds.

    ``total`` edits, ``consequences`` of them following from others, of which ``matched`` hold the text looked for and
    ``edits`` are shown. ``memories`` is empty for shards, and ``shards`` for what was merged. ``keys`` counts the
    stored keys of edits; ``tensors`` has the type and shape of every tensor of ours, by file; ``files`` the bytes of
    every file. ``routing`` is ``router``, ``kind`` and so on of a memory.
    """

    path: Path
    kind: Kind | Literal["stock", "gguf"]
    base: dict[str, Any]
    site: dict[str, Any]
    edits: tuple[Edit, ...]
    matched: int
    total: int
    keys: int
    files: dict[str, int]
    tensors: dict[str, dict[str, str]]
    versions: dict[str, str]
    memories: tuple[MemoryEntry, ...] = ()
    shards: tuple[ShardEntry, ...] = ()
    routing: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    plot: Path | None = None
    consequences: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the one object that ``--json`` prints."""
        names = ("kind", "base", "site", "routing", "keys", "files", "tensors")
        counts = {"count": self.total - self.consequences, "consequences": self.consequences, "matched": self.matched}
        listed = {**counts, "listed": [edit.as_dict() for edit in self.edits]}
        return {
            "results": {
                "path": str(self.path),
                **{name: getattr(self, name) for name in names},
                "edits": listed,
                "memories": [asdict(entry) for entry in self.memories],
                "shards": [asdict(entry) for entry in self.shards],
                "plot": None if self.plot is None else str(self.plot),
            },
            "config": self.settings,
            "versions": self.versions,
            "n-samples": {"edits": self.total - self.consequences},
        }


def inspect(
    path: Path, *, find: str | None = None, limit: int | None = None, plot: Path | None = None, force: bool = False
) -> InspectReport:
    """Look into a directory. Reads its manifest and the headers of its tensors; loads no weights.

    Args:
        find: only list edits with this text in prompt, target, subject or id, in upper or lower case.
        limit: how many edits are listed at most.
        plot: where to draw the router's scores of edits and of unrelated text, with the threshold.
        force: replace an existing plot.

    Raises:
        WiseError: the directory is none that the program writes, or damaged; or the plot cannot be drawn.
    """
    return read_consistently(path, lambda: _inspected(path, find, limit, plot, force=force))


def _inspected(path: Path, find: str | None, limit: int | None, plot: Path | None, *, force: bool) -> InspectReport:
    """Return the report on shards, a memory or a checkpoint; draw the router scores into ``plot`` if that is given."""
    if holds_merged(path):
        return _stock(path, find, limit, plot)
    kind = kind_of(path)
    if plot is not None:
        if kind == "shards":
            raise SettingsError(f"--plot: {path} has no router yet; merge the shards and plot the memory")
        if plot.exists() and not force:
            raise OutputExistsError(plot)
    if kind == "shards":
        return _shards(path, find, limit)
    manifest = read_manifest(path)
    if plot is not None:
        plot_scores(plot, manifest)
    stored = manifest.memory
    header = read_header(inside(path, stored.file))
    return _report(
        path,
        manifest,
        (find, limit),
        kind=kind,
        base=asdict(manifest.base),
        memories=manifest.memories,
        routing={name: getattr(stored, name) for name in ("kind", "router", "pooling")},
        keys=_rows(header, stored.prefix, "whitened_keys"),
        tensors=_tensors({stored.file: header}),
        settings=manifest.merge,
        plot=plot,
    )


def _stock(path: Path, find: str | None, limit: int | None, plot: Path | None) -> InspectReport:
    """Return the report on a stock checkpoint, whose router is in its blocks."""
    if plot is not None:
        raise SettingsError(f"--plot: {path} has no router; plot the memory that it was exported from")
    if read_json(path / MERGED).get("format") == "merged":
        raise ModelError(f"{path} is a merged checkpoint, of which {MERGED} says all there is; inspect its memory")
    manifest, figures = read_stock(path), figures_of(path)
    shares = {f"as {form}": _shares(figures.get(form)) for form in ("stock", "routed")}
    headers = {file.name: read_header(file) for file in sorted(path.glob(MEMORY_TENSORS))}
    numbers = manifest.blocks(int(read_json(path / "config.json")["num_hidden_layers"])) if headers else []
    return _report(
        path,
        manifest,
        (find, limit),
        kind=manifest.format,
        base=asdict(manifest.base),
        routing={"kind": "gate", "blocks": manifest.gate.blocks, **shares},
        keys=manifest.gate.keys,
        tensors=_tensors(headers, parts=tuple(f".{number}." for number in numbers)),
    )


def _shares(figures: object) -> str:
    """Return a form's measured shares as a phrase."""
    own = figures if isinstance(figures, dict) else {}
    return " ".join(f"{name} {value:.3f}" for name, value in own.items() if isinstance(value, float))


def _shards(path: Path, find: str | None, limit: int | None) -> InspectReport:
    """Return the report on a directory of shards."""
    directory = read_shard_directory(path)
    headers = {entry.file: read_header(inside(path, entry.file)) for entry in directory.shards}
    return _report(
        path,
        directory,
        (find, limit),
        kind="shards",
        base={"model": directory.model, "revision": directory.revision, **directory.fingerprint.as_dict()},
        shards=directory.shards,
        keys=sum(_rows(header, "", "evidence.keys") for header in headers.values()),
        tensors=_tensors(headers),
        settings=directory.settings,
    )


def _report(
    path: Path,
    written: MemoryManifest | ShardDirectory | StockManifest,
    shown: tuple[str | None, int | None],
    **more: Any,
) -> InspectReport:
    """Return a report with what every kind of directory has, and ``more``; ``shown`` is the text looked for, and the
    limit.
    """
    wanted, limit = (shown[0] or "").casefold(), shown[1]
    texts = ("\n".join((edit.id, edit.prompt, edit.target, edit.subject or "")) for edit in written.edits)
    found = [edit for edit, text in zip(written.edits, texts, strict=True) if wanted in text.casefold()]
    entries = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    return InspectReport(
        path,
        site=written.site.as_dict(),
        edits=tuple(found[:limit]),
        matched=len(found),
        total=len(written.edits),
        consequences=len(consequences_in(written.edits)),
        files={entry.name: entry.stat().st_size for entry in entries},
        versions=written.versions,
        **more,
    )


def _rows(header: Header, prefix: str, name: str) -> int:
    """Return the rows of a file's tensor of today's name; 0 without one."""
    layout = {current_name(stored.removeprefix(prefix)): tensor for stored, tensor in header.tensors.items()}.get(name)
    return layout.shape[0] if layout is not None and layout.shape else 0


def _tensors(headers: dict[str, Header], parts: tuple[str, ...] = ("",)) -> dict[str, dict[str, str]]:
    """Return type and shape of every tensor whose name contains one of ``parts``, by file."""
    return {
        file: {name: str(info) for name, info in sorted(read.tensors.items()) if any(part in name for part in parts)}
        for file, read in headers.items()
    }
