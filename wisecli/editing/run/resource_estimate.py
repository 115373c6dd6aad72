"""What a run will take, from file headers and settings alone: memory, disk, bytes read and arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from wisecli.config import EditSettings
from wisecli.data.corpus import subjects_for
from wisecli.editing.background.sample_sizes import CALIBRATION_KEYS, CONTINUATION_TOKENS, CONTINUED
from wisecli.editing.examples.token_check import Length
from wisecli.editing.run.array_sizes import (
    BATCH_TOKENS,
    Rows,
    fit_bytes,
    kept_bytes,
    readings,
    routed_bytes,
    shard_rows,
    solve_bytes,
)
from wisecli.editing.run.router_training_sizes import RouterTraining
from wisecli.io.checkpoint import Checkpoint, read_json
from wisecli.models.layout.architectures import layer_count
from wisecli.models.layout.site import Site
from wisecli.models.streaming.memory_budget import Experts, Sizes, expert_rooms, in_hand, libraries, sizes, spool_bytes

if TYPE_CHECKING:
    import torch

# Usual lengths in tokens: of an unrelated text, of a reworded fact.
_TEXT, _FACT = 22, 11
# Wordings of a fact of each relation, together.
_WORDINGS = 210
_GIB = 1 << 30
# Sweeps to the router's layer, and to the gate's, by which the router is trained.
_SWEEPS = 3
# What a process takes for each byte it holds: blocks that were freed stay with it in part, and kernels are compiled.
_ALLOCATED = 1.25
# Rank of the moments; bytes a number.
_RANK, _FLOAT32 = 512, 4


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
    work = _Work(checkpoint, site, settings, lengths, dtype, experts)
    plan = work.within(memory_budget)
    if plan.fits:
        return plan
    least = plan
    while not least.fits:
        least = work.within(-(-least.peak * 100 // _GIB) * _GIB // 100)
    return replace(plan, least=least.budget)


@dataclass(frozen=True)
class _Work:
    """What a run has to do, of which a budget says how much memory and reading it takes."""

    checkpoint: Checkpoint
    site: Site
    settings: EditSettings
    lengths: Sequence[Length]
    dtype: torch.dtype | str
    experts: Experts

    def within(self, budget: int | None) -> Plan:
        """Return the plan within a budget of memory."""
        spool = None if budget is None else spool_bytes(self.checkpoint, self.dtype, budget)
        if budget is not None and spool is not None:
            return self._streamed(budget, spool)
        return Plan(
            streamed=False,
            weights=self.sizes.weights,
            resident=self.sizes.weights,
            held=0,
            layer=max(self.sizes.layers),
            peak=self._allocated(self.sizes.weights + max(self.measuring + self.copied, self.solving)),
            spooled=0,
            sweep=0,
            read=0,
            flops=self.flops,
            budget=budget,
        )

    def _streamed(self, budget: int, spool: int) -> Plan:
        """Return the plan of a model whose layers pass through.

        Args:
            spool: bytes that a sweep may keep in memory of what it carries.
        """
        sizes, first = self.sizes, self.site.layer + 1
        above, experts = sum(sizes.dense[first:]), sum(sizes.experts[first:])
        passing, largest = 2 * max(sizes.dense) + in_hand(sizes.expert), max(sizes.experts)
        before = min(largest, sum(expert_rooms(budget, sizes.resident + passing, largest)))
        kept, staying = expert_rooms(budget, sizes.resident + passing + above, largest)
        staying, routed = min(staying, experts), routed_bytes(sizes, self.site.d, self._sent_to)
        peak = max(
            passing + before + routed + min(self.carried[0], spool) + 4 * self.site.width * self.background_tokens,
            self.measuring,
            above + staying + passing + kept + min(self.carried[1], spool) + self.evidence,
            above + staying + in_hand(sizes.expert) + self.solving,
        )
        return Plan(
            streamed=True,
            weights=sizes.weights,
            resident=sizes.resident,
            held=above + staying,
            layer=max(sizes.dense) + in_hand(sizes.expert) + kept,
            peak=self._allocated(sizes.resident + peak),
            spooled=max(0, max(self.carried) - spool),
            sweep=sum(sizes.layers[:first]),
            read=self._read(kept, staying),
            flops=self.flops,
            budget=budget,
        )

    def _read(self, kept: int, staying: int) -> int:
        """Return the bytes that a run reads of the layers: of experts for which there is no room once for every batch.

        Args:
            kept: bytes of experts that stay of a layer that is swept.
            staying: bytes of those above the site that stay.
        """
        sizes, settings, first = self.sizes, self.settings, self.site.layer + 1
        below, above = sum(sizes.layers[:first]), sum(sizes.layers[first:])
        gone = [max(0, size - kept) for size in sizes.experts[:first]]
        texts, shard, fitted = map(self._batches, (self.largest_sweep, self.rows.read, self.rows.trained))
        shards = -(-len(self.lengths) // settings.edits_per_shard)
        read = (CONTINUATION_TOKENS + 1 + settings.context_tokens + 1) * (below + above) + above
        read += 2 * (below + (texts - 1) * sum(gone)) + 2 * shards * (below + (shard - 1) * sum(gone))
        for layers in (self.training.router_layers, self.training.gate_layers):
            read += _SWEEPS * (sum(sizes.layers[:layers]) + (texts - 1) * sum(gone[:layers]))
        return read + 2 * shards * settings.residual_steps * fitted * max(0, sum(sizes.experts[first:]) - staying)

    def _batches(self, tokens: int) -> int:
        """Return how many batches rows of so many tokens make."""
        return max(1, -(-tokens // min(BATCH_TOKENS, self.settings.batch_size * _TEXT)))

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of the model and its parts."""
        layers = self.site.prefix_in(self.checkpoint).partition(f".{self.site.layer}.")[0]
        return sizes(self.checkpoint, layers, self.dtype, self.experts)

    def _allocated(self, held: float) -> int:
        """Return the most memory of the process while so many bytes are held of a model and its texts."""
        return round(_ALLOCATED * (libraries(self.checkpoint.directory) + held))

    @property
    def copied(self) -> int:
        """Bytes of a model's copy in bfloat16, in which texts are read by processors that are quicker at that."""
        return self.sizes.weights // 2 if self.sizes.item == _FLOAT32 else 0

    @cached_property
    def rows(self) -> Rows:
        """Tokens of the largest shard."""
        return shard_rows(self.settings, self.lengths)

    @cached_property
    def training(self) -> RouterTraining:
        """What training the router reads."""
        return RouterTraining.of(self.settings, self.site, layer_count(self.checkpoint.directory))

    @property
    def background_tokens(self) -> int:
        """Tokens of unrelated text."""
        return self.settings.background_texts * _TEXT

    @property
    def fact_tokens(self) -> int:
        """Tokens of the reworded facts."""
        return _WORDINGS * subjects_for(self.settings.background_texts) * _FACT

    @property
    def largest_sweep(self) -> int:
        """Tokens of the largest sweep that is not over edits."""
        return max(self.background_tokens, self.fact_tokens, self.training.prompts)

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes of hidden states and keys that a sweep carries from layer to layer: of texts, and of edits; of prompts
        that the router is trained with the states that left its own layer instead of keys.
        """
        training = self.training
        below = self.site.d if training.gate_layers > training.router_layers else self.site.width
        texts = max(
            self.largest_sweep * self.site.d + self.background_tokens * self.site.width,
            training.prompts * (self.site.d + below),
        )
        edits = self.rows.read * self.site.d + self.rows.trained * self.site.width
        return self.sizes.item * texts, self.sizes.item * edits

    def _statistics(self, copies: float, moments: int) -> float:
        """Return the bytes of so many copies of unrelated text's keys, of its sample and of so many moments."""
        texts = self.background_tokens
        return 4 * self.site.width * (copies * texts + min(CALIBRATION_KEYS, texts / 2) + moments * _RANK)

    @cached_property
    def measuring(self) -> float:
        """Bytes that measuring unrelated text, or training the router, takes beside the model."""
        return max(self._statistics(2.5, 4), self.training.held)

    @cached_property
    def evidence(self) -> float:
        """Bytes of unrelated text's statistics, and of what is kept of a shard's rows."""
        return self._statistics(0.5, 2) + kept_bytes(self.checkpoint, self.site, self.rows, self.sizes.item)

    @cached_property
    def solving(self) -> float:
        """Bytes that fitting residuals, or solving for a change, takes beside the model."""
        fitting = fit_bytes(self.checkpoint, self.site, self.settings, self.lengths, self.sizes.item)
        return self.evidence + max(solve_bytes(self.site, self.settings, self.rows), fitting)

    @property
    def _sent_to(self) -> int | None:
        """How many experts of a layer a token is sent to, where the model says it."""
        config = read_json(self.checkpoint.directory / "config.json")
        count = (config.get("text_config") or config).get("num_experts_per_tok")
        return None if count is None else int(count)

    @property
    def _run_sizes(self) -> list[int]:
        """Bytes of each layer that a token runs through: of experts those alone that it is sent to."""
        sizes, count = self.sizes, self._sent_to
        run = [whole if count is None else min(count * sizes.expert, whole) for whole in sizes.experts]
        return [dense + experts for dense, experts in zip(sizes.dense, run, strict=True)]

    @cached_property
    def flops(self) -> int:
        """Floating-point operations, two for each weight and token; fitting goes through the layers above forth and
        back.
        """
        settings, first = self.settings, self.site.layer + 1
        weights = [size // self.sizes.item for size in self._run_sizes]
        below, above = sum(weights[:first]), sum(weights[first:])
        continued = settings.background_texts // CONTINUED * _TEXT
        tokens = (readings(settings) + 1) * sum(map(sum, self.lengths))
        read = self.background_tokens + self.fact_tokens + tokens
        fitted = sum(length.target for length in self.lengths) * settings.residual_steps * 2
        trained = self.training.facts * sum(weights[: self.training.router_layers])
        trained += self.training.prompts * sum(weights[: self.training.gate_layers])
        whole = 2 * (continued * (below + above) + read * below + (tokens + fitted) * above)
        return whole + 2 * trained
