"""What ``wise export`` reads: a memory that is whole, in one of its states, and the base model that it is for."""

from dataclasses import dataclass
from pathlib import Path

from wisecli.artifacts.checksums import require_checksums, require_signature
from wisecli.artifacts.directory_kind import base_of
from wisecli.artifacts.memory_manifest import MANIFEST_NAME, Manifest, read_manifest, read_memory
from wisecli.config import LoadOptions
from wisecli.edits.checks.signatures import Signed
from wisecli.export.gguf.gguf_file import Quantization
from wisecli.export.weights import Packing
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.consistent_read import read_consistently
from wisecli.io.digest import sha256_file
from wisecli.memory.history.release_log import has_history, read_history, require_whole
from wisecli.models.loading import is_exported


@dataclass(frozen=True)
class ExportSource:
    """What a checkpoint is written from, and how.

    ``quantize`` says how the weights of one file of llama.cpp's are stored, if it is to be one; ``verify`` whether what
    was written as blocks is asked its edits, and unrelated texts.
    """

    base: Path
    checkpoint: Checkpoint
    manifest: Manifest
    packing: Packing
    quantize: Quantization | None
    load: LoadOptions
    verify: bool


def read_source(memory: Path, model: str | None, signed: Signed | None) -> tuple[Path, Manifest, str]:
    """Return the base model of a memory, the memory, and its manifest's digest, all of one release.

    Raises:
        SignatureError: it was not signed as it must be.
        WiseError: a file of it or of its history was altered, or it is not of the base model.
    """
    return read_consistently(memory, lambda: _read(memory, model, signed))


def _read(memory: Path, model: str | None, signed: Signed | None) -> tuple[Path, Manifest, str]:
    """Return the base of a memory, its manifest, and that file's digest.

    No file of it, nor of its history, may be altered, and it must be signed, if it is to be.
    """
    require_signature(memory, signed)
    if has_history(memory):
        listed = require_whole(memory, read_history(memory))
    else:
        listed = read_manifest(memory)
        require_checksums(memory, expected=listed.sealed)
    manifest = read_memory(memory, check=not has_history(memory), listed=listed)
    base = base_of(memory, manifest, model, exported=is_exported(memory))
    return base, manifest, sha256_file(memory / MANIFEST_NAME)
