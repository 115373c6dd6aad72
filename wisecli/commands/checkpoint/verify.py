"""``wise verify``: every file of a directory against its manifest, and the base model against its fingerprint."""

import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

from wisecli.artifacts import memory_manifest, shard_manifest
from wisecli.artifacts.checksums import (
    CHECKSUMS,
    HAS_CHECKSUMS,
    check_checksums,
    has_checksums,
    is_signed,
    read_checksums,
    require_signature,
)
from wisecli.artifacts.directory_kind import kind_of, written_form
from wisecli.artifacts.file_names import MEMORY_TENSORS, MERGED
from wisecli.artifacts.former_names import current_names
from wisecli.artifacts.integrity import Check, check_base, check_digest, check_index, check_layouts, check_rows, damaged
from wisecli.artifacts.shard import shard_rows, shard_sizes
from wisecli.artifacts.tensor_schema import PROMPT_TOKENS, SOME_EVIDENCE, background_rows, memory_rows
from wisecli.commands.checkpoint.verify_code import check_code
from wisecli.commands.checkpoint.verify_report import VerifyReport
from wisecli.edits.checks.signatures import Signed
from wisecli.errors import ModelError, WiseError
from wisecli.export.stock.stock_manifest import check_around, check_blocks, is_wider, read_stock
from wisecli.io.checkpoint import EXPORTED_KEY, INDEX_NAME, read_json
from wisecli.io.consistent_read import read_consistently
from wisecli.io.digest import sha256_file
from wisecli.io.json_schema import shown
from wisecli.io.safe_paths import inside
from wisecli.io.safetensors_header import TensorLayout, read_header
from wisecli.memory.history.release_log import HISTORY, LOG, has_history, read_history
from wisecli.models.layout.site import Fingerprint, Site
from wisecli.models.model_files import resolve_model
from wisecli.progress import Event, ProgressCallback, ignore_progress

T = TypeVar("T")
_CONFIG_NAME = "config.json"
_MATTERS = (".safetensors", ".py", ".json")


def verify(
    path: Path,
    *,
    model: str | None = None,
    signed: Signed | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> VerifyReport:
    """Check a directory of shards, a memory with its history, or an exported checkpoint against what its manifest says.

    Args:
        model: where the base model is now, if not where the manifest says; nothing is downloaded.
        signed: the signature that the list of its digests must have.

    Raises:
        SignatureError: it was not signed as it must be.
        ModelError: the directory is none of these, or ``model`` is no directory of a model.
    """
    return read_consistently(path, lambda: _verified(path, model, signed, on_progress))


def _verified(path: Path, model: str | None, signed: Signed | None, on_progress: ProgressCallback) -> VerifyReport:
    """Check the signature, then every file; return all checks, passed or not."""
    require_signature(path, signed)
    kind = written_form(path) or kind_of(path)
    given = None if model is None else resolve_model(model, fetch=False)
    checks = []
    for check in (*_signature(path, signed), *_CHECKS[kind](path, given)):
        checks.append(check)
        on_progress(Event("checking", len(checks)))
    return VerifyReport(path, kind, tuple(checks))


def _signature(path: Path, signed: Signed | None) -> Iterator[Check]:
    if signed is not None:
        yield Check("signature", CHECKSUMS)
    elif is_signed(path):
        yield Check("signature", CHECKSUMS, "unchecked", found="say whose it must be with --verify-signature")


def _manifest(path: Path, name: str, read: Callable[[Path], T]) -> Generator[Check, None, T | None]:
    """Yield the checks of reading a manifest, and return what it says, or ``None`` if it cannot be read."""
    try:
        found = read(path)
    except WiseError as error:
        yield damaged(name, error)
        return None
    yield Check("manifest", name)
    return found


def _shards(path: Path, model: Path | None) -> Iterator[Check]:
    """Yield the checks of a directory of shards."""
    directory = yield from _manifest(path, shard_manifest.MANIFEST_NAME, shard_manifest.read_shard_directory)
    if directory is None:
        return
    sizes = shard_sizes(directory.site, len(directory.edits))
    solved = ("prompts.states",) if directory.settings.get("writer") == "solve" else ()
    for entry in directory.shards:
        yield from check_digest(path, entry.file, entry.sha256)
        optional = {**SOME_EVIDENCE, **(PROMPT_TOKENS if solved else {})}
        there = {*solved, *(name for name in _names(path, entry.file) if name in optional)}
        yield from check_rows(path, entry.file, shard_rows(entry.mask_kind, there, solved=entry.solved), sizes)
        yield from _shard_metadata(path, entry)
    file = shard_manifest.UNRELATED_NAME
    yield from check_digest(path, file, directory.unrelated_sha256)
    yield from check_rows(path, file, background_rows(_names(path, file)), {"d_ff": directory.site.width})
    yield from _base(directory.model, directory.revision, directory.site, directory.fingerprint, model)


def _shard_metadata(path: Path, entry: shard_manifest.ShardEntry) -> Iterator[Check]:
    """Yield checks of what a shard's own header says of it, which travels with the file."""
    try:
        stored = json.loads(read_header(inside(path, entry.file)).metadata.get("wise.shard", "null"))
    except (WiseError, ValueError, RecursionError):
        stored = None
    stored = stored if isinstance(stored, dict) else {}
    for name, expected in (("mask_kind", entry.mask_kind), ("edits", list(entry.edits))):
        if stored.get(name) != expected:
            yield Check(f"metadata {name}", entry.file, "differs", None, shown(expected), shown(stored.get(name)))


def _memory(path: Path, model: Path | None) -> Iterator[Check]:
    """Yield the checks of a memory."""
    manifest = yield from _memory_files(path)
    if manifest is None:
        return
    if has_history(path):
        yield from _history(path, manifest)
    base = manifest.base
    yield from _base(base.model, base.revision, manifest.site, base.fingerprint, model)


def _history(path: Path, manifest: memory_manifest.MemoryManifest) -> Iterator[Check]:
    """Yield checks of the log, and whether the memory is its newest release."""
    name = f"{HISTORY}/{LOG}"
    try:
        releases = read_history(path)
    except WiseError as error:
        yield damaged(name, error)
        return
    yield Check(f"log of {len(releases)} releases", name)
    newest = releases[-1]
    sides = [(manifest.memory.file, newest.memory, manifest.sha256[manifest.memory.file])]
    if newest.manifest:
        sides += [(memory_manifest.MANIFEST_NAME, newest.manifest, sha256_file(path / memory_manifest.MANIFEST_NAME))]
    for file, expected, found in sides:
        same = expected == found
        what = f"as in release {newest.number}"
        yield Check(what, file) if same else Check(what, file, "differs", None, expected, found)


def _sealed(path: Path) -> dict[str, str]:
    """Return the digests that were checked already; empty without a complete list of them."""
    try:
        return read_checksums(path)
    except WiseError:
        return {}


def _memory_files(path: Path) -> Generator[Check, None, memory_manifest.MemoryManifest | None]:
    """Yield the checks of a manifest and the files that it lists; return what it says, if it can be read."""
    manifest = yield from _manifest(path, memory_manifest.MANIFEST_NAME, memory_manifest.read_manifest)
    yield from check_checksums(path, expected=manifest is None or manifest.sealed)
    if manifest is None:
        return None
    stored, site, checked = manifest.memory, manifest.site, _sealed(path)
    for file, digest in manifest.sha256.items():
        if file not in checked:
            yield from check_digest(path, file, digest)
        elif checked[file] != digest:
            yield Check(f"sha256 in {CHECKSUMS}", file, "differs", None, digest, checked[file])
    yield from check_layouts(path, stored.file, stored.layouts, stored.prefix)
    known = {"d": site.d, "d_ff": site.width, "M": len(stored.thresholds)}
    yield from check_rows(path, stored.file, memory_rows(stored.kind, stored.tensors), known, stored.prefix)
    return manifest


def _exported(path: Path, model: Path | None) -> Iterator[Check]:
    """Yield the checks of a routed checkpoint."""
    manifest = yield from _memory_files(path)
    if manifest is None:
        return
    if not has_checksums(path):
        yield from _unlisted(path, manifest)
    yield from check_index(path)
    try:
        config = read_json(path / _CONFIG_NAME)
    except WiseError as error:
        yield damaged(_CONFIG_NAME, error)
    else:
        yield from _config(config, manifest, read_json(path / memory_manifest.MANIFEST_NAME)["memory"])
        yield from check_code(path, config)
    yield from check_base(path, manifest.site, manifest.base.fingerprint, settings=False)
    if model is not None:
        yield from check_base(model, manifest.site, manifest.base.fingerprint)


def _merged(path: Path, _model: Path | None) -> Iterator[Check]:
    """Yield checks of a checkpoint without a router, which no manifest describes further."""
    content = yield from _manifest(path, MERGED, lambda directory: read_json(directory / MERGED))
    yield from check_checksums(path, expected=content is None or bool(content.get(HAS_CHECKSUMS)))
    if (path / INDEX_NAME).is_file():
        yield from check_index(path)


def _stock(path: Path, model: Path | None) -> Iterator[Check]:
    """Yield checks of a checkpoint with the memory as decoder blocks: of those, and of the base model around them."""
    yield from _merged(path, model)
    manifest = yield from _manifest(path, MERGED, read_stock)
    if manifest is None:
        return
    yield from check_blocks(path, manifest)
    if not is_wider(path, manifest):  # then what was edited has zeros beside it, and another digest
        yield from check_base(path, manifest.site, manifest.base.fingerprint, settings=False, without=MEMORY_TENSORS)
    if model is not None:
        yield from check_base(model, manifest.site, manifest.base.fingerprint)
        yield from check_around(path, model, manifest)


def _gguf(path: Path, model: Path | None) -> Iterator[Check]:
    """Yield the check of a GGUF file, of which there is its digest alone."""
    yield from _merged(path, None)
    manifest = yield from _manifest(path, MERGED, read_stock)
    if manifest is not None and model is not None:
        yield from check_base(model, manifest.site, manifest.base.fingerprint)


def _unlisted(path: Path, manifest: memory_manifest.MemoryManifest) -> Iterator[Check]:
    """Yield a failed check for each weights, code or settings file without a digest in the manifest."""
    for entry in sorted(path.iterdir()):
        if entry.suffix in _MATTERS and entry.name not in (*manifest.sha256, memory_manifest.MANIFEST_NAME):
            yield Check("sha256", entry.name, "unchecked", found=f"{memory_manifest.MANIFEST_NAME} has no digest of it")


def _config(
    config: dict[str, Any], manifest: memory_manifest.MemoryManifest, memory: dict[str, Any]
) -> Iterator[Check]:
    """Yield checks of what the routed model is built from, against ``router.json``."""
    in_config, site = config.get(EXPORTED_KEY), manifest.site
    in_config = in_config if isinstance(in_config, dict) else {}
    described = {name: value for name, value in memory.items() if name not in ("file", "prefix")}
    wanted = {**site.described(), "model_type": site.architecture}
    wrong = [(name, value, in_config.get(name)) for name, value in wanted.items() if in_config.get(name) != value]
    found = in_config.get("memory")
    found = found if isinstance(found, dict) else {}
    wrong += [(f"memory.{n}", value, found.get(n)) for n, value in described.items() if found.get(n) != value]
    for name, expected, value in wrong:
        yield Check(f"{EXPORTED_KEY}.{name}", _CONFIG_NAME, "differs", None, shown(expected), shown(value))
    if not wrong:
        yield Check(f"memory as in {memory_manifest.MANIFEST_NAME}", _CONFIG_NAME)


def _base(name: str, revision: str | None, site: Site, mark: Fingerprint, model: Path | None) -> Iterator[Check]:
    try:
        base = model or resolve_model(name, revision=revision, fetch=False)
    except ModelError:
        yield Check("base model", name, "unchecked", found="it is not here; say where it is with --model")
        return
    yield from check_base(base, site, mark)


def _names(path: Path, file: str) -> dict[str, TensorLayout]:
    try:
        return current_names(read_header(inside(path, file)).tensors)
    except WiseError:
        return {}


_CHECKS: dict[str, Callable[[Path, Path | None], Iterator[Check]]] = {
    "shards": _shards,
    "memory": _memory,
    "exported": _exported,
    "merged": _merged,
    "stock": _stock,
    "gguf": _gguf,
}
