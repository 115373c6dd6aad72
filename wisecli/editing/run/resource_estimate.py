"""What a run will take, from file headers and settings alone: memory, disk, bytes read and arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from wisecli.config import EditSettings
from wisecli.data.corpus import subjects_for
from wisecli.editing.background.sample_sizes import CALIBRATION_KEYS, CONTINUATION_TOKENS, CONTINUED
from wisecli.editing.examples.token_check import Length
from wisecli.editing.run.array_sizes import BATCH_TOKENS, fit_bytes, kept_bytes, readings, shard_rows, solve_bytes
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import layer_count
from wisecli.models.layout.site import Site
from wisecli.models.streaming.memory_budget import (
    LIBRARIES,
    Experts,
    Sizes,
    expert_rooms,
    in_hand,
    sizes,
    spool_bytes,
)

if TYPE_CHECKING:
    import torch

# Usual lengths in tokens: of an unrelated text, of a reworded fact.
_TEXT, _FACT = 22, 11
# Wordings of a fact of each relation, together.
_WORDINGS = 210
# Tokens that are read to learn what prompts mean, and of how many of them states are kept.
_ASKED, _COMPARED = 250_000, 140_000
_GIB = 1 << 30
# Rank of the moments.
_RANK = 512


@dataclass(frozen=True)
class Plan:
    """What an edit is expected to take, in bytes, and in floating-point operations.

    ``resident`` stays in memory throughout, ``held`` from the edits' capture on (the layers above the site), ``layer``
    is the largest that passes through, ``peak`` the most memory at a time. Of a mixture, whose experts are read one by
    one, both count those that stay within the budget. ``sweep`` is what reading the layers up to
    the site once takes, ``read`` all that the run reads of the layers, ``spooled`` what may lie on the disk meanwhile;
    these are zero for a model that is held whole. ``budget`` is how much memory there is, if that is known, and
    ``least`` the least that is enough, where that is not.
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
    budget: int | None = None
    least: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the most memory at a time is within the budget."""
        return self.budget is None or self.peak <= self.budget

    @property
    def remedy(self) -> str:
        """What makes a plan smaller: of one whose weights alone are too many, to hold fewer layers."""
        larger = "a larger --memory-budget"
        if self.least is not None:
            larger += f" ({self.least / _GIB:.2f}GiB is the least that does)"
        if self.streamed and self.resident + self.held + self.layer > (self.budget or 0):
            return f"choose a higher --layer, above which fewer layers are held, or give {larger}"
        return f"give fewer edits_per_shard, a smaller batch_size or {larger}"


def plan_edit(
    checkpoint: Checkpoint,
    site: Site,
    settings: EditSettings,
    lengths: Sequence[Length],
    *,
    dtype: torch.dtype | str = "auto",
    memory_budget: int | None = None,
    experts: Experts = (),
) -> Plan:
    """Return what ``wise edit`` will take for edits of these lengths; nothing that the cache may spare is taken off.

    Args:
        experts: how many numbers each layer's experts have, and one of them, if they are read one by one.
    """
    job = _Work(checkpoint, site, settings, lengths, dtype, experts)
    plan = job.within(memory_budget)
    if plan.fits:
        return plan
    least = plan
    while not least.fits:
        least = job.within(-(-least.peak * 100 // _GIB) * _GIB // 100)
    return replace(plan, least=least.budget)


class _Work:
    """What a run has to do, of which a budget says how much memory and reading it takes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        site: Site,
        settings: EditSettings,
        lengths: Sequence[Length],
        dtype: torch.dtype | str,
        experts: Experts,
    ) -> None:
        layers = site.prefix_in(checkpoint).partition(f".{site.layer}.")[0]
        self.found = found = sizes(checkpoint, layers, dtype, experts)
        self.checkpoint, self.site, self.settings, self.dtype = checkpoint, site, settings, dtype
        self.edits, texts = len(lengths), settings.background_texts * _TEXT
        self.rows = rows = shard_rows(settings, lengths)
        # What a sweep carries, of unrelated text and of edits: hidden states, and keys.
        self.early, self.asked, compared = _router_training(checkpoint, site, settings)
        most = max(texts, _fact_tokens(settings), self.asked)
        self.carried = [
            found.item * values
            for values in (most * site.d + texts * site.width, rows.read * site.d + rows.trained * site.width)
        ]
        self.keys = 4 * site.width * texts
        measured = 4 * site.width * (2.5 * texts + min(CALIBRATION_KEYS, texts / 2) + 4 * _RANK)
        self.measured = max(measured, 2 * site.d * compared)
        self.known = 4 * site.width * (0.5 * texts + min(CALIBRATION_KEYS, texts / 2) + 2 * _RANK)
        self.known += kept_bytes(checkpoint, site, rows, found.item)
        self.solved = self.known + max(
            solve_bytes(site, settings, rows), fit_bytes(checkpoint, site, settings, lengths, found.item)
        )
        # Batches of a sweep over unrelated text and over a shard, and those whose residuals are fitted.
        self.batches = [_batches(tokens, settings) for tokens in (most, rows.read, rows.trained)]
        early = sum(found.layers[: self.early]) // found.item
        self.flops = _flops(found, site, settings, lengths) + 2 * self.asked * early

    def within(self, budget: int | None) -> Plan:
        """Return the plan within a budget of memory."""
        room = None if budget is None else spool_bytes(self.checkpoint, self.dtype, budget)
        found = self.found
        if budget is not None and room is not None:
            return self._streamed(budget, room)
        peak = LIBRARIES + found.weights + max(self.measured, self.solved)
        held = found.weights
        return Plan(False, held, held, 0, max(found.layers), round(peak), 0, 0, 0, self.flops, budget)

    def _streamed(self, budget: int, room: int) -> Plan:
        """Return the plan of a model whose layers pass through.

        Args:
            room: bytes of what a sweep may keep in memory.
        """
        found, first = self.found, self.site.layer + 1
        above, experts = sum(found.dense[first:]), sum(found.experts[first:])
        passing, largest = 2 * max(found.dense) + in_hand(found.expert), max(found.experts)
        before = min(largest, sum(expert_rooms(budget, found.resident + passing, largest)))
        kept, staying = expert_rooms(budget, found.resident + passing + above, largest)
        staying = min(staying, experts)
        peak = max(
            passing + before + min(self.carried[0], room) + self.keys,
            self.measured,
            above + staying + passing + kept + min(self.carried[1], room) + self.known,
            above + staying + in_hand(found.expert) + self.solved,
        )
        return Plan(
            True,
            found.weights,
            found.resident,
            above + staying,
            max(found.dense) + in_hand(found.expert) + kept,
            round(LIBRARIES + found.resident + peak),
            max(0, max(self.carried) - room),
            sum(found.layers[:first]),
            self._read(kept, staying),
            self.flops,
            budget,
        )

    def _read(self, kept: int, staying: int) -> int:
        """Return the bytes that a run reads of the layers: of experts for which there is no room once for every batch.

        Args:
            kept: bytes of experts that stay of a layer that is swept.
            staying: bytes of those above the site that stay.
        """
        found, settings, first = self.found, self.settings, self.site.layer + 1
        below, above = sum(found.layers[:first]), sum(found.layers[first:])
        gone = [max(0, size - kept) for size in found.experts[:first]]
        texts, shard, fitted = self.batches
        shards = -(-self.edits // settings.edits_per_shard)
        read = (CONTINUATION_TOKENS + 1 + settings.context_tokens + 1) * (below + above) + above
        read += 2 * (below + (texts - 1) * sum(gone)) + 2 * shards * (below + (shard - 1) * sum(gone))
        read += 2 * (sum(found.layers[: self.early]) + (texts - 1) * sum(gone[: self.early]))
        return read + 2 * shards * settings.residual_steps * fitted * max(0, sum(found.experts[first:]) - staying)


def _batches(tokens: int, settings: EditSettings) -> int:
    """Return how many batches rows of so many tokens make."""
    return max(1, -(-tokens // min(BATCH_TOKENS, settings.batch_size * _TEXT)))


def _fact_tokens(settings: EditSettings) -> int:
    """Return how many tokens the reworded facts have."""
    return _WORDINGS * subjects_for(settings.background_texts) * _FACT


def _router_training(checkpoint: Checkpoint, site: Site, settings: EditSettings) -> tuple[int, int, int]:
    """Return what training the router reads: layers, tokens, and the number of states that are kept."""
    if not settings.by_facts:
        return 0, 0, 0
    share = min(1.0, settings.unrelated_texts / EditSettings.unrelated_texts)
    layers = site.router_layer(layer_count(checkpoint.directory)) + 1
    return layers, round(_ASKED * share), round(_COMPARED * share)


def _flops(found: Sizes, site: Site, settings: EditSettings, lengths: Sequence[Length]) -> int:
    """Return floating-point operations, two for each weight and token; fitting goes through the layers above forth and
    back.
    """
    weights = [size // found.item for size in found.layers]
    below, above = sum(weights[: site.layer + 1]), sum(weights[site.layer + 1 :])
    continued = settings.background_texts // CONTINUED * _TEXT
    tokens = (readings(settings) + 1) * sum(map(sum, lengths))
    read = settings.background_texts * _TEXT + _fact_tokens(settings) + tokens
    fitted = sum(length.target for length in lengths) * settings.residual_steps * 2
    return 2 * (continued * (below + above) + read * below + (tokens + fitted) * above)
