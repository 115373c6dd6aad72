"""What a run will take, from file headers and settings alone: memory, disk, bytes read and arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wisecli.config import EditSettings
from wisecli.data.corpus import subjects_for
from wisecli.editing.background.sample_sizes import CALIBRATION_KEYS, CONTINUATION_TOKENS, CONTINUED
from wisecli.editing.examples.context_prefixes import FORM_CONTEXTS
from wisecli.editing.examples.token_check import Length
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import layer_count, text_settings
from wisecli.models.layout.site import Site
from wisecli.models.streaming.memory_budget import Sizes, sizes, spool_bytes

if TYPE_CHECKING:
    import torch

# The interpreter with torch and transformers, in bytes.
_LIBRARIES = 600 << 20
# Usual lengths in tokens: of an unrelated text, of a reworded fact.
_TEXT, _FACT = 22, 11
# What a batch of more than one row holds at most, in tokens.
_BATCH = 4096
# How many blocks with a row for each trained token are solved with at a time.
_BLOCKS = 5
# How many tensors of a kind there are at a time while residuals are fitted: attention scores, logits, hidden states and
# inner states of a layer; and while rows are only read.
_SCORES, _LOGITS, _HIDDEN, _INNER = 4, 4, 12, 6
# Wordings of a fact of each relation, together.
_WORDINGS = 210
# Tokens that are read to learn what prompts mean, and of how many of them states are kept.
_ASKED, _COMPARED = 250_000, 140_000
# Rank of the moments.
_RANK = 512


@dataclass(frozen=True)
class Plan:
    """What an edit is expected to take, in bytes, and in floating-point operations.

    ``resident`` stays in memory throughout, ``held`` from the edits' capture on (the layers above the site), ``layer``
    is the largest that passes through, ``peak`` the most memory at a time. ``sweep`` is what reading the layers up to
    the site once takes, ``read`` all that the run reads of the layers, ``spooled`` what may lie on the disk meanwhile;
    these are zero for a model that is held whole. ``budget`` is how much memory there is, if that is known.
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

    @property
    def fits(self) -> bool:
        """Whether the most memory at a time is within the budget."""
        return self.budget is None or self.peak <= self.budget

    @property
    def remedy(self) -> str:
        """What makes a plan smaller: of one whose weights alone are too many, to hold fewer layers."""
        if self.streamed and self.resident + self.held + self.layer > (self.budget or 0):
            return "choose a higher --layer, above which fewer layers are held, or give a larger --memory-budget"
        return "give fewer edits_per_shard, a smaller batch_size or a larger --memory-budget"


def plan_edit(
    checkpoint: Checkpoint,
    site: Site,
    settings: EditSettings,
    lengths: Sequence[Length],
    *,
    dtype: torch.dtype | str = "auto",
    memory_budget: int | None = None,
) -> Plan:
    """Return what ``wise edit`` will take for edits of these lengths; nothing that the cache may spare is taken off."""
    found = sizes(checkpoint, site.prefix_in(checkpoint).partition(f".{site.layer}.")[0], dtype)
    below, above = sum(found.layers[: site.layer + 1]), sum(found.layers[site.layer + 1 :])
    room = None if memory_budget is None else spool_bytes(checkpoint, dtype, memory_budget)
    texts, edits = settings.background_texts * _TEXT, len(lengths)
    rows = _shard_rows(settings, lengths)
    # What a sweep carries, of unrelated text and of edits: hidden states, and keys.
    facts = _fact_tokens(settings)
    early, asked, compared = _router_training(checkpoint, site, settings)
    carried = max(texts, facts, asked) * site.d + texts * site.width, rows.read * site.d + rows.trained * site.width
    carried_bytes = [found.item * values for values in carried]
    measured = 4 * site.width * (2.5 * texts + min(CALIBRATION_KEYS, texts / 2) + 4 * _RANK)
    measured = max(measured, 2 * site.d * compared)
    known = 4 * site.width * (0.5 * texts + min(CALIBRATION_KEYS, texts / 2) + 2 * _RANK) + _kept_bytes(
        checkpoint, site, rows, found.item
    )
    solved = known + max(
        _solve_bytes(site, settings, rows), _fit_bytes(checkpoint, site, settings, lengths, found.item)
    )
    flops = _flops(found, site, settings, lengths) + 2 * asked * (sum(found.layers[:early]) // found.item)
    if room is None:
        peak = _LIBRARIES + found.weights + max(measured, solved)
        held = found.weights
        return Plan(False, held, held, 0, max(found.layers), round(peak), 0, 0, 0, flops, memory_budget)
    passing = 2 * max(found.layers)
    peak = max(
        passing + min(carried_bytes[0], room) + 4 * site.width * texts,
        measured,
        above + passing + min(carried_bytes[1], room) + known,
        above + solved,
    )
    sweeps = 2 + CONTINUATION_TOKENS + 1 + settings.context_tokens + 1
    read = (sweeps - 2) * (below + above) + (2 + 2 * -(-edits // settings.edits_per_shard)) * below + above
    read += 2 * sum(found.layers[:early])
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
        memory_budget,
    )


def _fact_tokens(settings: EditSettings) -> int:
    """Return how many tokens the reworded facts have."""
    return _WORDINGS * subjects_for(settings.background_texts) * _FACT


@dataclass(frozen=True)
class _Rows:
    """Tokens of the rows of one shard: all that are read, and those from the prompts' last ones on."""

    read: int
    trained: int


def _readings(settings: EditSettings) -> int:
    """Return how often each edit is read: bare, in contexts or forms and one held back, and in other words."""
    forms = len(FORM_CONTEXTS) if settings.in_forms else settings.contexts + settings.chat
    return forms + settings.augment + 2


def _router_training(checkpoint: Checkpoint, site: Site, settings: EditSettings) -> tuple[int, int, int]:
    """Return what training the router reads: layers, tokens, and the number of states that are kept."""
    if not settings.by_facts:
        return 0, 0, 0
    share = min(1.0, settings.unrelated_texts / EditSettings.unrelated_texts)
    layers = site.router_layer(layer_count(checkpoint.directory)) + 1
    return layers, round(_ASKED * share), round(_COMPARED * share)


def _shard_rows(settings: EditSettings, lengths: Sequence[Length]) -> _Rows:
    """Return those of the shard with the longest edits."""
    longest = sorted(lengths, key=sum, reverse=True)[: settings.edits_per_shard]
    ways = _readings(settings)
    return _Rows(ways * sum(map(sum, longest)), ways * sum(one.target for one in longest))


def _kept_bytes(checkpoint: Checkpoint, site: Site, rows: _Rows, item: int) -> int:
    """Return the bytes of activations that batches keep of a shard's rows, and of what the layers above need of the
    prompts.
    """
    shape = _attention(checkpoint)
    past = 2 * (layer_count(checkpoint.directory) - site.layer - 1) * shape.kept
    return item * (rows.trained * (site.d + site.width) + rows.read * past)


@dataclass(frozen=True)
class _Attention:
    """Heads of a layer, and how many numbers of keys it keeps of each token; the size of the vocabulary."""

    heads: int
    kept: int
    vocabulary: int


def _attention(checkpoint: Checkpoint) -> _Attention:
    """Return the sizes of attention and of the vocabulary that a model's configuration gives."""
    config = text_settings(checkpoint.directory)

    def number(*names: str, otherwise: int) -> int:
        return next((config[name] for name in names if type(config.get(name)) is int), otherwise)

    heads = max(1, number("num_attention_heads", "n_head", otherwise=1))
    width = number("head_dim", otherwise=-(-number("hidden_size", "n_embd", otherwise=1) // heads))
    kept = width * number("num_key_value_heads", "num_kv_heads", otherwise=heads)
    return _Attention(heads, kept, number("vocab_size", otherwise=1))


def _fit_bytes(checkpoint: Checkpoint, site: Site, settings: EditSettings, lengths: Sequence[Length], item: int) -> int:
    """Return what the largest batch takes while it is read, or while its residuals are fitted through the layers
    above.
    """
    shape, above = _attention(checkpoint), layer_count(checkpoint.directory) - site.layer - 1
    most = 0
    for length in lengths:
        whole = sum(length)
        rows = max(1, min(settings.batch_size, _BATCH // whole))
        read = rows * whole * (whole * _SCORES + item * (_HIDDEN * site.d + _INNER * site.width))
        states = item * above * (_HIDDEN * site.d + _INNER * site.width)
        scores = 4 * shape.heads * whole * _SCORES
        fitted = rows * length.target * (states + scores + 4 * _LOGITS * shape.vocabulary)
        most = max(most, read, fitted)
    return most


def _solve_bytes(site: Site, settings: EditSettings, rows: _Rows) -> int:
    """Return the bytes of the closed form's statistics, in float64: squares of the columns' number, and blocks as long
    as ``W``.
    """
    if settings.writer != "solve":
        # Whatever shrinks besides is kept as well.
        return 16 * round((1 if settings.weight_decay else settings.mask_ratio) * site.d * site.width)
    if settings.for_lookup:
        return 0
    width = round(settings.mask_ratio * site.width) if settings.mask_kind == "columns" else site.width
    return 8 * (5 * width**2 + 4 * width * site.d + _BLOCKS * rows.trained * (width + site.d))


def _flops(found: Sizes, site: Site, settings: EditSettings, lengths: Sequence[Length]) -> int:
    """Return floating-point operations, two for each weight and token; fitting goes through the layers above forth and
    back.
    """
    weights = [size // found.item for size in found.layers]
    below, above = sum(weights[: site.layer + 1]), sum(weights[site.layer + 1 :])
    continued = settings.background_texts // CONTINUED * _TEXT
    tokens = (_readings(settings) + 1) * sum(map(sum, lengths))
    read = settings.background_texts * _TEXT + _fact_tokens(settings) + tokens
    fitted = sum(length.target for length in lengths) * settings.residual_steps * 2
    return 2 * (continued * (below + above) + read * below + (tokens + fitted) * above)
