"""The router heads of a base model: the cache's, those that come with the package, or newly trained ones."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from wisecli.artifacts.background_stats import RouterHeads, load_heads
from wisecli.editing.router_training.projection_training import train_heads, unrelated_states
from wisecli.editing.router_training.token_states import ReadSites
from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import keep_in_cache, save_tensors
from wisecli.io.digest import sha256_json
from wisecli.io.packaged_weights import packaged_file, save_packaged
from wisecli.io.user_cache import cache_path
from wisecli.models.base_identity import BaseIdentity
from wisecli.models.loading import Loaded
from wisecli.progress import ProgressCallback

_VERSION = 56
# What the model makes of unrelated text is read in the type in which it runs.
_READ_ANEW = ("heads.unrelated", "heads.text")


def router_heads(
    loaded: Loaded,
    sites: ReadSites,
    identity: BaseIdentity,
    *,
    texts: int,
    batch_size: int,
    on_progress: ProgressCallback,
) -> RouterHeads:
    """Return the router heads of a base model, and keep them in the cache.

    Args:
        texts: how many unrelated texts go with them; with few, less is learned.
    """
    about = [identity.exact, *_layers(sites), texts, str(loaded.model.dtype), loaded.device.type, _VERSION]
    path = cache_path("meaning") / f"{sha256_json(about)[:32]}.safetensors"
    with suppress(DamagedFileError):
        if (heads := load_heads(path)) is not None:
            return heads
    packaged, heads = packaged_file(heads_key(identity, sites)), None
    if packaged is not None:
        read = unrelated_states(loaded, sites, texts=texts, batch_size=batch_size, on_progress=on_progress)
        heads = load_heads(packaged, dict(zip(_READ_ANEW, (read.states, read.text), strict=True)))
    if heads is None:
        heads = train_heads(loaded, sites, texts=texts, batch_size=batch_size, on_progress=on_progress)
    tensors = heads.tensors()
    keep_in_cache(path, lambda working: save_tensors(working, tensors, {}))
    return heads


def package_heads(path: Path, heads: RouterHeads, identity: BaseIdentity, sites: ReadSites) -> None:
    """Write heads as the package has them: without states of unrelated text, which are read anew."""
    kept = {name: tensor for name, tensor in heads.tensors().items() if name not in _READ_ANEW}
    save_packaged(path, kept, heads_key(identity, sites))


def heads_key(identity: BaseIdentity, sites: ReadSites) -> str:
    """Return by what heads of a base model, for the layers that are read, are known in the package."""
    return sha256_json(["heads", identity.rounded, *_layers(sites), _VERSION])


def _layers(sites: ReadSites) -> list[str]:
    return [one.layer_module for one in sites if one is not None]
