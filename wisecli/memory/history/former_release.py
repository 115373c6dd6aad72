"""What the newest release of a memory saves the next one: edits of both are not compared again."""

import json
from collections.abc import Mapping
from pathlib import Path

from wisecli.artifacts.memory_manifest import Manifest, read_memory
from wisecli.config import MergeSettings, settings_from
from wisecli.environment import changed_versions
from wisecli.io.checkpoint import load_tensors, save_tensors
from wisecli.io.safetensors_header import read_header
from wisecli.memory.fitting.former_memory import EditProbs, FormerMemory
from wisecli.memory.history.open_memory import OpenMemory
from wisecli.memory.history.release_log import HISTORY, PROBS_NAME, Release
from wisecli.memory.merging.merger import Merger

# The key of what the file says of itself, and the number of the way in which memories are merged: it goes up whenever
# the same shards come to make other tensors.
_ABOUT, _MERGING = "wise.probabilities", 2
# Further edits are compared by themselves where there are so many times as many before them.
_TIMES = 8


def write_probs(working: Path, probs: EditProbs | None, digest: str) -> None:
    """Store the probabilities that prompts mean edits in a release that is being made, if edits are routed by facts.

    Args:
        digest: of the file of the memory's tensors.
    """
    path = working / HISTORY / PROBS_NAME
    path.unlink(missing_ok=True)
    if probs is not None:
        about = {"memory": digest, "merging": _MERGING}
        found = {name: tensor for name, tensor in probs._asdict().items() if tensor is not None}
        save_tensors(path, found, {_ABOUT: json.dumps(about)})


def former_memory(memory: OpenMemory, shards: Mapping[str, tuple[str, ...]], merger: Merger) -> FormerMemory | None:
    """Return what a merge can reuse of the newest release, if that saves much.

    Args:
        shards: of what the next release is made: the names of directories, and ids of their edits that are left out.
        merger: of those directories.

    Returns:
        None unless the newest release was merged from the first of them alone, in the same way.
    """
    if not memory.releases or not merger.settings.for_lookup or not merger.by_facts:
        return None
    newest = memory.releases[-1]
    count = len(newest.shards)
    path = memory.path / HISTORY / PROBS_NAME
    if not count or not path.is_file() or not _continues(newest, shards, merger):
        return None
    if _metadata(path) != {"memory": newest.memory, "merging": _MERGING}:
        return None
    probs, found = load_tensors(path), read_memory(memory.path, check=False, listed=memory.manifest)
    former = FormerMemory(found.memory.tensors, EditProbs(probs["own"], probs["other"], probs.get("possible")), count)
    return former if _fits(former, found, merger) else None


def _continues(newest: Release, shards: Mapping[str, tuple[str, ...]], merger: Merger) -> bool:
    """Return whether shards are those of a release with further ones after them, merged by the same settings."""
    count = len(newest.shards)
    same = list(shards.items())[:count] == list(newest.shards.items()) and len(shards) > count
    if not same or settings_from(MergeSettings, newest.merge) != merger.settings:
        return False
    before, further = merger.directories[:count], merger.directories[count:]
    known = {old.unrelated_sha256 for old in before}
    return (
        all(new.unrelated_sha256 in known for new in further)
        and any(old.separator_token_id is not None for old in before) == (merger.separator_token_id is not None)
        and _TIMES * sum(len(new.written) for new in further) <= sum(len(old.written) for old in before)
    )


def _metadata(path: Path) -> object:
    """Return what a file of probabilities says of itself."""
    try:
        return json.loads(read_header(path).metadata.get(_ABOUT, ""))
    except ValueError:
        return None


def _fits(former: FormerMemory, found: Manifest, merger: Merger) -> bool:
    """Return whether a memory's tensors and probabilities are of the first edits of a merger, made as it makes them."""
    tensors, probs = former.tensors, former.probs
    kept = len(tensors["late_interaction.prompt_to_edit"])
    return (
        not changed_versions(found.versions)
        and found.fingerprint == merger.directories[0].fingerprint
        and found.edits == merger.edits[: former.edits]
        and probs.own.shape == (kept,)
        and probs.other.shape == (len(found.edits),)
        and all(bool(((prob >= 0) & (prob <= 1)).all()) for prob in probs[:2])
        and (probs.possible is None or bool(((probs.possible >= 0) & (probs.possible < kept)).all()))
        and ("pairs.usable" in tensors) == (merger.separator_token_id is not None)
    )
