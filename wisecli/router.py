"""Where the router's thresholds are decided: the key router, calibration, and the manifest ``router.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wisecli.edits import Edit
from wisecli.errors import DamagedFileError
from wisecli.memory import SideMemory
from wisecli.moments import Whitening
from wisecli.site import Fingerprint, Site
from wisecli.storage import load_tensors, read_json, save_tensors, sha256_file, write_json

MANIFEST_NAME = "router.json"
MEMORY_NAME = "memory.safetensors"
SCHEMA = "wise.memory/1"
# How much nearer than to its answer's own tokens elsewhere a key must be, and how near is always near enough.
_APART, _SURE = 0.02, 0.97
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class Calibration:
    """A threshold, how it was found, and the scores on both sides of it.

    ``misses`` is the share of the edits' scores under unseen contexts that stay below; ``false_alarms`` that of
    unrelated text above.
    """

    threshold: float
    rule: str
    misses: float
    false_alarms: float
    edit_scores: dict[str, float]
    unrelated_scores: dict[str, float]


def calibrate(
    edits: Tensor, unrelated: Tensor, *, rule: str, false_alarm: float, kinds: Tensor | None = None
) -> Calibration:
    """Decide ε from scores of edits (n,) and of unrelated text (m,).

    Args:
        rule: ``false-alarm`` lets a share ``false_alarm`` of unrelated tokens through; ``minimum`` is the lowest score
            of any edit (the paper, section 3.1).
        kinds: of unrelated text (m,), each of which has the rate to itself; one by default.
    """
    found = float(edits.min() * (1 - 1e-6)) if rule == "minimum" else strictest(unrelated, 1 - false_alarm, kinds)
    return measure(edits, unrelated, max(found, 1e-6), rule=rule)  # the router compares by factors: none may be zero


def measure(edits: Tensor, unrelated: Tensor, threshold: float, *, rule: str) -> Calibration:
    """What a threshold that was decided elsewhere does to scores of edits (n,) and of unrelated text (m,)."""
    misses = float((edits <= threshold).float().mean())
    alarms = float((unrelated > threshold).float().mean())
    return Calibration(threshold, rule, misses, alarms, _summary(edits), _summary(unrelated))


def strictest(values: Tensor, share: float, kinds: Tensor | None) -> float:
    """The highest of the quantiles of each kind's values (n,)."""
    if kinds is None:
        return quantile(values, share)
    return max(quantile(values[kinds == kind], share) for kind in kinds.unique().tolist())


def quantile(values: Tensor, share: float) -> float:
    """A quantile of any number of values (torch's own stops at 16 million)."""
    ordered = values.flatten().float().sort().values
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def _summary(scores: Tensor) -> dict[str, float]:
    return {f"{share:g}": round(quantile(scores, share), 6) for share in _QUANTILES}


def key_router(keys: Tensor, owner: Tensor, metric: Tensor, metrics: Sequence[Whitening]) -> dict[str, Tensor]:
    """Tensors of the key router.

    Args:
        keys: of the edits (n, d_ff), with the memory that each opens, ``owner`` (n,), and the whitening it is seen
            through, ``metric`` (n,).
        metrics: the whitenings, of equal rank.
    """
    probes = torch.empty_like(keys)
    for number, white in enumerate(metrics):
        probes[metric == number] = white.probes(keys[metric == number])
    return {
        "probes": probes,
        "offset": torch.zeros(len(keys)),
        "owner": owner,
        "metric": metric,
        "directions": torch.stack([white.directions for white in metrics]),
        "gains": torch.stack([white.gains for white in metrics]),
        "floors": torch.tensor([white.floor for white in metrics]),
    }


def even_out(
    peaks: Tensor, metric: Tensor, elsewhere: Tensor, shares: Sequence[float], *, kinds: Tensor | None = None
) -> tuple[Tensor, float]:
    """Factors f (n,) with which ``1 - f (1 - cosine)`` lets all keys share one threshold, and that threshold.

    A key itself scores 1 whatever its own bar is, so that of several open probes the one that fits best is nearest.

    Args:
        peaks: highest cosine of each unrelated key with a probe of either metric (m, 2).
        metric: of each probe (n,).
        elsewhere: how near a probe comes to its answer's own tokens after prompts it does not answer (n,).
        shares: of unrelated keys of a kind, that each metric lets through on its own.
        kinds: of unrelated text (m,); one by default.
    """
    levels = torch.tensor([strictest(peak, 1 - share, kinds) for peak, share in zip(peaks.T, shares, strict=True)])
    levels = levels.clamp(min=1e-6, max=_SURE)
    bars = torch.maximum(levels[metric], (elsewhere + _APART).clamp(max=_SURE) * (elsewhere > 0))
    return (1 - levels[0]) / (1 - bars), float(levels[0])


@dataclass(frozen=True)
class Manifest:
    """Everything ``router.json`` says of a memory."""

    model: str
    revision: str | None
    fingerprint: Fingerprint
    site: Site
    memory: SideMemory
    calibrations: tuple[Calibration, ...]
    owners: tuple[tuple[str, ...], ...]
    merge: dict[str, Any]
    edits: tuple[Edit, ...]
    versions: dict[str, str]


def write_memory(directory: Path, manifest: Manifest, *, file: str = MEMORY_NAME, prefix: str = "") -> None:
    """Write the memory's tensors, their names prefixed, and ``router.json`` into a directory."""
    path = directory / file
    save_tensors(path, {prefix + name: tensor for name, tensor in manifest.memory.tensors.items()})
    memories = [
        {"kind": manifest.memory.kind, "router": manifest.memory.router, "edits": list(owned), **asdict(calibration)}
        for owned, calibration in zip(manifest.owners, manifest.calibrations, strict=True)
    ]
    content = {
        "schema": SCHEMA,
        "base": {"model": manifest.model, "revision": manifest.revision, **manifest.fingerprint.as_dict()},
        "site": manifest.site.as_dict(),
        "routing": manifest.memory.routing,
        "memories": memories,
        "memory": {"file": file, "prefix": prefix, **manifest.memory.describe()},
        "merge": manifest.merge,
        "edits": [edit.as_dict() for edit in manifest.edits],
        "sha256": {file: sha256_file(path)},
        "versions": manifest.versions,
    }
    write_json(directory / MANIFEST_NAME, content)


def read_memory(directory: Path) -> Manifest:
    """Read ``router.json`` and the memory's tensors, checking their digest.

    Raises:
        DamagedFileError: a file is missing, truncated or altered.
    """
    path = directory / MANIFEST_NAME
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise DamagedFileError(path, f"its schema is {content.get('schema')!r}, not {SCHEMA!r}", "merge anew")
    try:
        described, base = content["memory"], content["base"]
        file, prefix = described["file"], described["prefix"]
        tensors = load_tensors(directory / file, digest=content["sha256"][file])
        calibrations, owners = _read_memories(content["memories"])
        return Manifest(
            base["model"],
            base["revision"],
            Fingerprint(base["matrix"], base["config"]),
            Site(**content["site"]),
            SideMemory.from_description(described, {n.removeprefix(prefix): tensor for n, tensor in tensors.items()}),
            calibrations,
            owners,
            content["merge"],
            tuple(Edit.from_dict(edit) for edit in content["edits"]),
            content["versions"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(path, f"an entry is missing or wrong ({error})", "merge anew") from None


def _read_memories(
    records: Sequence[dict[str, Any]],
) -> tuple[tuple[Calibration, ...], tuple[tuple[str, ...], ...]]:
    names = Calibration.__dataclass_fields__
    calibrations = tuple(Calibration(**{name: record[name] for name in names}) for record in records)
    return calibrations, tuple(tuple(record["edits"]) for record in records)


def scores(routed: Any, keys: Tensor, *, batch: int = 4096) -> Tensor:
    """Scores (n, M) of many keys (n, d_ff), a slice at a time."""
    return torch.cat([routed.scores(part) for part in keys.split(batch)])
