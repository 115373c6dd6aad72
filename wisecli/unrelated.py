"""What a base model makes of text that no edit may touch: measured once a model and layer, then cached.

A sample of keys that edits must stay away from calibrates the router. Two second moments whiten keys for it. That of
all *tokens* is for keys inside answers. That of *wording* is for the keys that prompts end in: the moment of those,
plus, many times over, of what a change of wording alone does to them. Whitened by it, keys of one fact asked in several
ways come close, and keys of different facts asked in the same words come apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.capture import capture
from wisecli.contexts import chat_prompt, continuations, reworded_facts, unrelated_texts
from wisecli.encode import Row, collate, in_batches
from wisecli.errors import DamagedFileError, NoSpaceError
from wisecli.events import Event, Watcher
from wisecli.models import Loaded
from wisecli.shards import half
from wisecli.site import Fingerprint, Site, value_module
from wisecli.storage import load_tensors, save_tensors, sha256_json

# How many tokens the model adds to each unrelated prompt that comes whole, and how many of those there are.
_CONTINUED, _CONTINUATION = 120, 12
# Facts of each relation that are asked in every wording there is.
_SUBJECTS = 8
# Unrelated keys kept for calibration, and rank of what is kept of the moments.
_SAMPLE, _RANK = 4096, 512
# A decomposition is exact up to this many rows or columns.
_EXACT = 4096
# How often what wording does counts beside the keys themselves. More changes nothing; at 0 a rephrase in ten is lost.
_WORDING = 8.0
# Rank of a whitening: beyond it the moment is taken as even in all directions. 512 routes no better.
_WHITENED = 256
# Eigenvalues are raised by this share of their mean before they are inverted.
_SHRINKAGE = 0.1
_VERSION = 4


@dataclass(frozen=True)
class Moment:
    """Leading eigenvalues ``variances`` (r,) and ``directions`` (r, d_ff) of ``E[a aᵀ]``; ``energy`` (1,) its trace."""

    variances: Tensor
    directions: Tensor
    energy: Tensor

    def dense(self) -> Tensor:
        """``E[a aᵀ]`` (d_ff, d_ff), what the leading part leaves spread evenly."""
        rank, d_ff = self.directions.shape
        rest = (self.energy - self.variances.sum()).clamp(min=0) / max(d_ff - rank, 1)
        scaled = (self.directions.T * (self.variances - rest)) @ self.directions
        return scaled + rest * torch.eye(d_ff, dtype=scaled.dtype, device=scaled.device)


@dataclass(frozen=True)
class Whitening:
    """``P = floor · I + directionsᵀ diag(gains) directions``: directions (r, d_ff), gains (r,)."""

    directions: Tensor
    gains: Tensor
    floor: float

    def apply(self, keys: Tensor) -> Tensor:
        """``P a`` for keys (..., d_ff)."""
        return self.floor * keys + ((keys @ self.directions.T) * self.gains) @ self.directions

    def probes(self, keys: Tensor) -> Tensor:
        """``P e / √(eᵀP e)`` for keys (n, d_ff)."""
        turned = self.apply(keys)
        return turned / (keys * turned).sum(-1, keepdim=True).clamp(min=1e-12).sqrt()

    def cosines(self, first: Tensor, second: Tensor) -> Tensor:
        """Whitened cosines of keys (n, d_ff) with keys (m, d_ff): (n, m)."""
        probes = self.probes(second)
        lengths = (first * self.apply(first)).sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
        found: Tensor = first @ probes.T / lengths
        return found


def whitening(moment: Moment) -> Whitening:
    """The inverse of a second moment, shrunk, from its leading part; what that leaves is spread evenly."""
    d_ff = moment.directions.shape[1]
    energy = float(moment.energy)
    leading = moment.variances[:_WHITENED]
    mean = energy / d_ff
    rest = max(energy - float(leading.sum()), 0.0) / max(d_ff - len(leading), 1)
    raised = mean * _SHRINKAGE
    floor = 1 / (rest + raised)
    # The unit in which P is measured cancels in a cosine; this one keeps its entries near 1.
    return Whitening(moment.directions[: len(leading)], mean * (1 / (leading + raised) - floor), mean * floor)


@dataclass(frozen=True)
class Unrelated:
    """Keys (n, d_ff) that no writer sees, for calibration; the moments of all tokens and of wording.

    ``size`` (1,) is the median of ``‖W a‖₂``, the unit for residuals and margins. ``against`` (m, d_ff) are the keys
    that writers may look at; they stay with ``wise edit`` and are not written into shards.
    """

    keys: Tensor
    tokens: Moment
    wording: Moment
    size: Tensor
    against: Tensor


def measure_unrelated(
    loaded: Loaded,
    site: Site,
    matrix: Tensor,
    identity: Fingerprint,
    *,
    texts: int,
    chat: bool,
    batch_size: int,
    seed: int,
    watch: Watcher,
) -> Unrelated:
    """Read text of many kinds through the model up to the site, or take what the cache remembers of it.

    Args:
        matrix: the base matrix ``W`` (d, d_ff).
        identity: of the base model, for the cache.
        texts: how many texts; half of them are kept from writers, for calibration.
        chat: whether facts are asked in the model's chat template as well.
    """
    about = [
        identity.as_dict(),
        site.as_dict(),
        texts,
        chat,
        seed,
        str(loaded.model.dtype),
        loaded.device.type,
        _VERSION,
    ]
    path = user_cache_path("wisecli") / "unrelated" / f"{sha256_json(about)[:32]}.safetensors"
    try:
        return _from_tensors(load_tensors(path), path)
    except DamagedFileError:
        watch(Event("unrelated text"))
    found = _measure(loaded, site, matrix, texts=texts, chat=chat, batch_size=batch_size, seed=seed, watch=watch)
    working = path.with_suffix(f".{id(found)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_unrelated(working, found, whole=True)
        working.replace(path)
    except (OSError, SafetensorError, NoSpaceError):
        with suppress(OSError):  # a cache that cannot be written only costs time
            working.unlink()
    return found


def _measure(
    loaded: Loaded, site: Site, matrix: Tensor, *, texts: int, chat: bool, batch_size: int, seed: int, watch: Watcher
) -> Unrelated:
    plain = unrelated_texts(texts, seed=seed)
    spoken = continuations(loaded.model, loaded.tokenizer, plain[:_CONTINUED], tokens=_CONTINUATION, seed=seed)
    keys, text, last = keys_of_texts(loaded, site, [*spoken, *plain[_CONTINUED:]], batch_size=batch_size, watch=watch)
    facts = reworded_facts(_SUBJECTS, seed=seed)
    asked = [[chat_prompt(loaded.tokenizer, way) for way in fact] for fact in facts] if chat else []
    prompts = [way for fact in [*facts, *asked] for way in fact]
    (ends,) = prompt_ends(loaded, [site], prompts, batch_size=batch_size, watch=watch)
    unseen = text % 2 == 0
    ways = ends.view(len(facts) + len(asked), -1, ends.shape[-1])
    strayed = (ways - ways.mean(1, keepdim=True)).flatten(0, 1)
    wording = leading(torch.cat([_even(torch.cat([keys[last & ~unseen], ends])), _even(strayed) * _WORDING**0.5]))
    size = (keys @ matrix.to(keys).T).norm(dim=-1).median().reshape(1)
    spaced = torch.linspace(0, int(unseen.sum()) - 1, min(_SAMPLE, int(unseen.sum()))).long()
    sample, against = keys[unseen][spaced.to(keys.device)], keys[~unseen]
    return Unrelated(_rounded(sample), leading(scaled(keys)), wording, size.cpu(), _rounded(against))


def keys_of_texts(
    loaded: Loaded, site: Site, texts: Sequence[str], *, batch_size: int, watch: Watcher
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (n, d_ff) of every token, in float32; the text each is of (n,); whether it is that text's last one (n,)."""
    rows = [row for row in (Row(tuple(loaded.tokenizer(text)["input_ids"]), ()) for text in texts) if row.prompt]
    keys, text, last = [], [], []
    done = 0
    for indices in in_batches(rows, batch_size):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        real = batch.mask.bool()
        keys.append(capture(loaded.model, site, batch, above=False).keys[real].float())
        text.append(torch.tensor(indices, device=real.device)[:, None].expand_as(real)[real])
        ends = torch.zeros_like(real)
        ends[:, -1] = True
        last.append(ends[real])
        done += len(indices)
        watch(Event("unrelated text", done, len(rows)))
    return torch.cat(keys), torch.cat(text), torch.cat(last)


@torch.no_grad()
def prompt_ends(
    loaded: Loaded, sites: Sequence[Site], prompts: Sequence[str], *, batch_size: int, watch: Watcher
) -> list[Tensor]:
    """Keys (n, d_ff) at the last token of each prompt, in order, for every site, from one pass up to the highest.

    Args:
        sites: from the lowest layer up.
    """
    rows = [Row(tuple(loaded.tokenizer(prompt)["input_ids"]), ()) for prompt in prompts]
    kept: list[dict[int, Tensor]] = [{} for _ in sites]
    for indices in in_batches(rows, batch_size):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        read: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for number, site in enumerate(sites[:-1]):
                handle = value_module(loaded.model, site).register_forward_pre_hook(_keeper(read, number))
                hooks.callback(handle.remove)
            read[len(sites) - 1] = capture(loaded.model, sites[-1], batch, above=False).keys[:, -1]
        for number, ends in read.items():
            kept[number].update(zip(indices, ends.float(), strict=True))
        watch(Event("reworded facts", len(kept[0]), len(rows)))
    return [torch.stack([own[index] for index in range(len(rows))]) for own in kept]


def _keeper(read: dict[int, Tensor], number: int) -> Any:
    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read[number] = inputs[0][:, -1]

    return keep


def scaled(keys: Tensor) -> Tensor:
    """Rows whose ``rowsᵀ rows`` is the keys' second moment."""
    rows: Tensor = keys / len(keys) ** 0.5
    return rows


def _even(keys: Tensor) -> Tensor:
    """The same, with 1 as the mean eigenvalue."""
    rows = scaled(keys)
    evened: Tensor = rows * (rows.shape[1] / rows.square().sum().clamp(min=1e-12)).sqrt()
    return evened


def leading(rows: Tensor, rank: int = _RANK) -> Moment:
    """The leading part of ``rowsᵀ rows`` for rows (n, d_ff); exact unless both sides are long."""
    energy = rows.double().square().sum().reshape(1).float().cpu()
    rank = min(rank, *rows.shape)
    if min(rows.shape) > _EXACT:
        with torch.random.fork_rng(devices=[rows.device] if rows.device.type == "cuda" else []):
            torch.manual_seed(0)
            _, lengths, vectors = torch.svd_lowrank(rows, q=rank, niter=4)
        return Moment(lengths.square().float().cpu(), vectors.T.float().contiguous().cpu(), energy)
    tall = len(rows) >= rows.shape[1]
    variances, vectors = torch.linalg.eigh((rows.T @ rows if tall else rows @ rows.T).double())
    kept, vectors = variances[-rank:].flip(0).clamp(min=0), vectors[:, -rank:].flip(1).to(rows.dtype)
    directions = vectors.T if tall else F.normalize(vectors.T @ rows, dim=-1)
    return Moment(kept.float().cpu(), directions.float().contiguous().cpu(), energy)


def _rounded(keys: Tensor) -> Tensor:
    """As the cache gives them back, so that a second run makes the same bytes."""
    return half(keys.cpu()).float()


def save_unrelated(path: Path, unrelated: Unrelated, *, whole: bool = False) -> None:
    """Write the statistics; ``whole`` keeps the keys that writers look at, too."""
    tensors = {"keys": half(unrelated.keys), "size": unrelated.size}
    for name in ("tokens", "wording"):
        moment = getattr(unrelated, name)
        tensors |= {f"{name}.{part}": getattr(moment, part) for part in Moment.__dataclass_fields__}
    if whole:
        tensors["against"] = half(unrelated.against)
    save_tensors(path, tensors, {"wise.unrelated": json.dumps({"version": _VERSION})})


def load_unrelated(path: Path, digest: str) -> Unrelated:
    """Read ``unrelated.safetensors``.

    Raises:
        DamagedFileError: it is truncated or altered.
    """
    return _from_tensors(load_tensors(path, digest=digest), path)


def _from_tensors(tensors: dict[str, Tensor], path: Path) -> Unrelated:
    def moment(name: str) -> Moment:
        return Moment(*(tensors[f"{name}.{part}"] for part in Moment.__dataclass_fields__))

    try:
        keys = tensors["keys"].float()
        against = tensors.get("against", keys[:0]).float()
        return Unrelated(keys, moment("tokens"), moment("wording"), tensors["size"], against)
    except KeyError as error:
        raise DamagedFileError(path, f"tensor {error.args[0]} is missing", "edit anew") from None
