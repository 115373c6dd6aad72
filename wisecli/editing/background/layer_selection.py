"""Which layer to edit: the one whose keys best recognise a fact that is asked in other words.

Residuals that make the upper layers say anything can be found at any layer; what differs is whether a rephrase finds
its edit. One pass over made-up facts in two wordings each reads the keys of all candidate layers. The layer at four
fifths of the depth is taken, unless another is clearly better. Where every token decides by itself, better is that more
wordings have their other wording as nearest whitened key. Where the prompt decides, later layers may serve, at which
keys inside answers say little but the token they stand at: better is that more wordings are nearer to their other
wording than nearly all other facts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wisecli.data.corpus import reworded_facts
from wisecli.editing.background.key_capture import prompt_ends
from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import Checkpoint, read_json, write_json
from wisecli.io.digest import sha256_json
from wisecli.io.user_cache import cache_path
from wisecli.models.layout.architectures import Layout, layer_count
from wisecli.models.layout.site import AUTO_DEPTH, Fingerprint, Site, find_site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.forward_pass import run_model
from wisecli.models.running.hooks import hooked
from wisecli.models.running.quick_products import quick_products
from wisecli.progress import Event, ProgressCallback, ignore_progress
from wisecli.routing.memories.whitening import leading, scaled, whitening

# Whenever other keys would be read for the same model, this changes.
_VERSION = 2
# The share of the depth among which to choose: below, subjects are still being read; above, little is left to steer.
_LOWEST, _HIGHEST = 0.6, 0.93
_SUBJECTS = 3
# How much more often than the usual layer another must be right to be taken: two and a half standard errors.
_CLEARLY = 0.05


def candidates(count: int) -> range:
    """Return the layers among which to choose, of a model that has ``count``."""
    highest = max(0, min(round(_HIGHEST * count), count - 2))
    return range(min(round(_LOWEST * count), highest), highest + 1)


def probe_layer(
    loaded: Loaded,
    directory: Path,
    checkpoint: Checkpoint,
    identity: Fingerprint,
    *,
    batch_size: int,
    on_progress: ProgressCallback,
    layout: Layout | None = None,
) -> Site:
    """Return the best site of a loaded model; remembered in the user's cache."""
    count = layer_count(directory) if layout is None or layout.depth is None else layout.depth
    sites = [find_site(directory, checkpoint, layer, layout) for layer in candidates(count)]
    if len(sites) == 1:
        return sites[0]
    constants = [_LOWEST, _HIGHEST, _SUBJECTS, _CLEARLY, _VERSION]
    about = [identity.as_dict(), checkpoint.sample, str(loaded.model.dtype), *constants]
    path = cache_path("layers") / f"{sha256_json(about)[:32]}.json"
    try:
        known = int(read_json(path)["layer"])
        return next(site for site in sites if site.layer == known)
    except (DamagedFileError, KeyError, ValueError, TypeError, StopIteration):
        on_progress(Event("layers"))
    sites = _that_run(loaded, sites)
    with quick_products(loaded, sites[-1]):
        wordings = keys_in_two_wordings(loaded, sites, batch_size=batch_size)
    shares = [recognition_rate(*keys) for keys in wordings]
    usual = min(range(len(sites)), key=lambda number: abs(sites[number].layer - round(AUTO_DEPTH * count)))
    first = max(range(len(sites)), key=shares.__getitem__)
    best = sites[first if shares[first] > shares[usual] + _CLEARLY else usual]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            path, {"layer": best.layer, "shares": {site.layer: s for site, s in zip(sites, shares, strict=True)}}
        )
    except OSError:
        pass  # a cache that cannot be written only costs time
    return best


def _that_run(loaded: Loaded, sites: Sequence[Site]) -> list[Site]:
    """Return the sites whose layers run on text; models that read images may skip some."""
    seen: set[int] = set()
    with ExitStack() as hooks:
        for site in sites:
            note = partial(lambda layer, *_: seen.add(layer), site.layer)
            hooks.enter_context(hooked(site.watched(loaded.model).register_forward_hook(note)))
        run_model(loaded.model, collate([Row((0, 1), (1,))]).to(loaded.device))
    return [site for site in sites if site.layer in seen]


def keys_in_two_wordings(loaded: Loaded, sites: Sequence[Site], *, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Return, for each site, the keys (n, d_ff) that facts end in when asked in one way, and in another."""
    facts = [ways[:2] for ways in reworded_facts(_SUBJECTS, seed=0)]
    prompts = [way for ways in zip(*facts, strict=True) for way in ways]
    keys = prompt_ends(loaded, sites, prompts, batch_size=batch_size, on_progress=ignore_progress)
    sound = torch.stack([key.isfinite().all(-1).view(2, -1).all(0) for key in keys]).all(0).repeat(2)
    pairs = (key[sound].cpu().chunk(2) for key in keys)
    return [(first, second) for first, second in pairs]


def recognition_rate(first: Tensor, second: Tensor) -> float:
    """Return the share of wordings whose nearest key of the other wording (n, d_ff) is that of the same fact."""
    nearest = whitening(leading(scaled(torch.cat([first, second])))).cosines(second, first)
    right = torch.arange(len(first))
    return float((nearest.argmax(0) == right).float().mean() + (nearest.argmax(1) == right).float().mean()) / 2
