"""Base models in whatever form they come: a directory, a hub id, or a GGUF file, which is turned into plain weights."""

from __future__ import annotations

import re
from pathlib import Path

from platformdirs import user_cache_path

from wisecli.errors import ModelError, reason_of
from wisecli.fetch import convert
from wisecli.io.atomic_output import require_space, whole_directory
from wisecli.io.checkpoint import resolve_model, sha256_file
from wisecli.progress import NOTE, Event, Watcher, ignore

# No quantisation of GGUF takes less than two bits a weight, and float32 takes 32.
_GROWTH = 16
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def find_model(model: str, *, revision: str | None = None, watch: Watcher = ignore) -> Path:
    """Directory of a base model in safetensors; a GGUF file is converted once, into the user's cache.

    Args:
        model: a directory, a hub id, a GGUF file or a directory that holds no other weights than one.

    Raises:
        ModelError: there is no such model, or it cannot be read.
    """
    gguf = gguf_of(Path(model))
    return resolve_model(model, revision=revision) if gguf is None else _converted(gguf, watch)


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path means, if it means one.

    Raises:
        ModelError: it holds several, or one that is in parts.
    """
    if path.is_dir():
        found = [] if any(path.glob("*.safetensors*")) else sorted(path.glob("*.gguf"))
    else:
        found = [path] if path.suffix == ".gguf" and path.is_file() else []
    if any(_PART.search(one.name) for one in found):
        raise ModelError(f"{found[0]} is one of several parts; join them with `llama-gguf-split --merge` first")
    if len(found) > 1:
        raise ModelError(f"{path} holds {len(found)} GGUF files; name the one to edit, as {found[0]}")
    return found[0] if found else None


def _converted(gguf: Path, watch: Watcher) -> Path:
    """The file's weights in float32, in a directory of the user's cache that is named by the file's content."""
    target = user_cache_path("wise") / "models" / f"{gguf.stem}-{sha256_file(gguf)[:16]}"
    watch(Event(NOTE, note=f"{gguf} is edited as plain float32 weights, which are kept in {target}"))
    if (target / "config.json").is_file():
        return target
    require_space(target, _GROWTH * gguf.stat().st_size)
    watch(Event("conversion"))
    with whole_directory(target, force=True) as working:
        try:
            convert(gguf, working)
        except (ValueError, KeyError, RuntimeError, OSError, NotImplementedError, AttributeError) as error:
            raise ModelError(f"{gguf}: transformers cannot read this GGUF file ({reason_of(error)})") from error
    return target
