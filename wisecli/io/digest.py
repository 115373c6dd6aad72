"""Digests of files, texts, JSON values and tensors. Exports carry this very file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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


def sha256_tensor(tensor: torch.Tensor) -> str:
    """Return the hex digest of a tensor's values in their own dtype (row-major)."""
    import torch  # takes seconds, which headers alone need not wait

    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()
