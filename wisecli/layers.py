"""Which layer to edit: the one whose keys best recognise a fact that is asked in other words.

Residuals that make the upper layers say anything can be found at any layer; what differs is whether a rephrase finds
its edit. One pass over made-up facts in two wordings each reads the keys of all candidate layers. The layer at four
fifths of the depth is taken, unless in another clearly more wordings have their other wording as nearest whitened key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from platformdirs import user_cache_path

from wisecli.contexts import reworded_facts
from wisecli.errors import DamagedFileError
from wisecli.events import Event, Watcher, ignore
from wisecli.models import Loaded
from wisecli.moments import leading, scaled, whitening
from wisecli.site import AUTO_DEPTH, Fingerprint, Layout, Site, find_site, layer_count
from wisecli.storage import Checkpoint, read_json, sha256_json, write_json
from wisecli.unrelated import prompt_ends

# The share of the depth among which to choose: below, subjects are still being read; above, little is left to steer.
_LOWEST, _HIGHEST = 0.6, 0.93
_SUBJECTS = 3
# How much more often than the usual layer another must be right to be taken: two and a half standard errors.
_CLEARLY = 0.05


def candidates(count: int) -> range:
    """The layers among which to choose, of a model that has ``count``."""
    highest = max(0, min(round(_HIGHEST * count), count - 2))
    return range(min(round(_LOWEST * count), highest), highest + 1)


def probe_layer(
    loaded: Loaded,
    directory: Path,
    checkpoint: Checkpoint,
    identity: Fingerprint,
    *,
    batch_size: int,
    watch: Watcher,
    layout: Layout | None = None,
) -> Site:
    """The best site of a loaded model; remembered in the user's cache."""
    count = layer_count(directory)
    sites = [find_site(directory, checkpoint, layer, layout) for layer in candidates(count)]
    if len(sites) == 1:
        return sites[0]
    about = [identity.as_dict(), checkpoint.sample, str(loaded.model.dtype), _LOWEST, _HIGHEST, _SUBJECTS, _CLEARLY]
    path = user_cache_path("wisecli") / "layers" / f"{sha256_json(about)[:32]}.json"
    try:
        known = int(read_json(path)["layer"])
        return next(site for site in sites if site.layer == known)
    except (DamagedFileError, KeyError, ValueError, TypeError, StopIteration):
        watch(Event("layers"))
    shares = recognised(loaded, sites, batch_size=batch_size)
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


def recognised(loaded: Loaded, sites: Sequence[Site], *, batch_size: int) -> list[float]:
    """For each site, the share of wordings whose nearest key among other facts' is the same fact in other words."""
    facts = [ways[:2] for ways in reworded_facts(_SUBJECTS, seed=0)]
    prompts = [way for ways in zip(*facts, strict=True) for way in ways]
    keys = prompt_ends(loaded, sites, prompts, batch_size=batch_size, watch=ignore)
    found = []
    sound = torch.stack([key.isfinite().all(-1).view(2, -1).all(0) for key in keys]).all(0).repeat(2)
    for own in (key[sound].cpu() for key in keys):
        white = whitening(leading(scaled(own)))
        first, second = own.chunk(2)
        nearest = white.cosines(second, first)
        right = torch.arange(len(first))
        found.append(
            float((nearest.argmax(0) == right).float().mean() + (nearest.argmax(1) == right).float().mean()) / 2
        )
    return found
