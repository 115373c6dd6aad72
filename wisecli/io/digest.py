"""Digests of files, texts and JSON values; those of tensors are in :mod:`wisecli.io.checkpoint`."""

import hashlib
import json
from pathlib import Path

# Chunks that stay near the core while they are read and digested.
_CHUNK = 1 << 18


def sha256_file(path: Path) -> str:
    """Return the hex digest of a file's bytes, read in chunks."""
    digest, chunk = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(chunk)
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(chunk):
            digest.update(view[:size])
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Return the hex digest of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_json(value: object) -> str:
    """Return the hex digest of a JSON value in canonical form; dates and other objects by their text."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
