"""What a run will take, from file headers and settings alone: memory, disk, bytes read and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wisecli.config import EditSettings
from wisecli.data.corpus import subjects_for
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.memory_budget import Sizes, sizes, spool_bytes
from wisecli.models.site import Site

# The interpreter with torch and transformers, in bytes.
_LIBRARIES = 600 << 20
# Usual lengths in tokens: of an unrelated text, of a reworded fact, of an edit's prompt in a context, of its window.
_TEXT, _FACT, _PROMPT, _WINDOW = 22, 11, 24, 6
# Wordings of a fact of each relation, together; texts that the model goes on with, by so many tokens.
_WORDINGS, _CONTINUED, _CONTINUATION = 210, 120, 12
# Keys kept for calibration; rank of the moments.
_SAMPLE, _RANK = 4096, 512


@dataclass(frozen=True)
class Plan:
    """What an edit is expected to take, in bytes, and in floating-point operations.

    ``resident`` stays in memory throughout, ``held`` from the edits' capture on (the layers above the site), ``layer``
    is the largest that passes through, ``peak`` the most memory at a time. ``sweep`` is what reading the layers up to
    the site once takes, ``read`` all that the run reads of the layers, ``spooled`` what may lie on the disk meanwhile;
    these are nought for a model that is held whole.
    """

    streamed: bool
    weights: int
    resident: int
    held: int
    layer: int
    peak: int
    spooled: int
    sweep: int
    read: int
    flops: int


def plan_edit(
    checkpoint: Checkpoint,
    site: Site,
    settings: EditSettings,
    edits: int,
    *,
    dtype: torch.dtype | str = "auto",
    memory_budget: int | None = None,
) -> Plan:
    """What ``wise edit`` will take for so many edits; nothing that the cache may spare is taken off."""
    found = sizes(checkpoint, site.layer_module.rpartition(".")[0], dtype)
    below, above = sum(found.layers[: site.layer + 1]), sum(found.layers[site.layer + 1 :])
    room = None if memory_budget is None else spool_bytes(checkpoint, dtype, memory_budget)
    texts, shard = settings.unrelated_texts * _TEXT, min(edits, settings.edits_per_shard)
    rows = shard * (settings.contexts + settings.augment + 1)
    # What a sweep carries, of unrelated text and of edits: hidden states, and keys.
    facts = _facts(settings)
    carried = max(texts, facts) * site.d + texts * site.d_ff, rows * (_PROMPT * site.d + _WINDOW * site.d_ff)
    carried_bytes = [found.item * one for one in carried]
    measured = 4 * site.d_ff * (2.5 * texts + min(_SAMPLE, texts / 2) + 4 * _RANK)
    known = 4 * site.d_ff * (0.5 * texts + min(_SAMPLE, texts / 2) + 2 * _RANK) + _kept(site, rows, found.item)
    solved = known + _solving(site, settings)
    flops = _flops(found, site, settings, edits)
    if room is None:
        peak = _LIBRARIES + found.weights + max(measured, solved)
        return Plan(False, found.weights, found.weights, 0, max(found.layers), round(peak), 0, 0, 0, flops)
    passing = 2 * max(found.layers)
    peak = max(
        passing + min(carried_bytes[0], room) + 4 * site.d_ff * texts,
        measured,
        above + passing + min(carried_bytes[1], room) + known,
        above + solved,
    )
    sweeps = 2 + _CONTINUATION + 1 + settings.context_tokens + 1
    read = (sweeps - 2) * (below + above) + (2 + 2 * -(-edits // settings.edits_per_shard)) * below + above
    spooled = max(0, max(carried_bytes) - room)
    return Plan(
        True,
        found.weights,
        found.resident,
        above,
        max(found.layers),
        round(_LIBRARIES + found.resident + peak),
        spooled,
        below,
        read,
        flops,
    )


def _facts(settings: EditSettings) -> int:
    """Tokens of the reworded facts."""
    return _WORDINGS * subjects_for(settings.unrelated_texts) * _FACT


def _kept(site: Site, rows: int, item: int) -> int:
    """Activations that batches keep of so many rows."""
    return rows * _WINDOW * (site.d + site.d_ff) * item


def _solving(site: Site, settings: EditSettings) -> int:
    """Statistics of the closed form, in float64: squares of the columns' number, blocks that are as long as ``W``."""
    if settings.writer != "solve":
        return 16 * round(settings.mask_ratio * site.d * site.d_ff)
    width = round(settings.mask_ratio * site.d_ff) if settings.mask_kind == "columns" else site.d_ff
    return 8 * (5 * width**2 + 4 * width * site.d)


def _flops(found: Sizes, site: Site, settings: EditSettings, edits: int) -> int:
    """Two a weight and token; fitting goes through the layers above forth and back."""
    weights = [size // found.item for size in found.layers]
    below, above = sum(weights[: site.layer + 1]), sum(weights[site.layer + 1 :])
    said = min(settings.unrelated_texts, _CONTINUED) * _TEXT
    rows = edits * (settings.contexts + settings.augment + 3)
    read = settings.unrelated_texts * _TEXT + _facts(settings) + rows * (_PROMPT + _WINDOW)
    fitted = edits * _WINDOW * settings.residual_steps * 2
    return 2 * (said * (below + above) + read * below + (rows * (_PROMPT + _WINDOW) + fitted) * above)
