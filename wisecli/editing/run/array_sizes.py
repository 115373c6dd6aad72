"""How large the arrays are while a shard is written, from the lengths of its edits: rows, activations, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wisecli.config import EditSettings
from wisecli.editing.examples.context_prefixes import FORM_CONTEXTS
from wisecli.editing.examples.token_check import Length
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import layer_count, text_settings
from wisecli.models.layout.site import Site
from wisecli.models.streaming.memory_budget import Sizes

# What a batch of more than one row holds at most, in tokens.
BATCH_TOKENS = 4096
# How many blocks with a row for each trained token are solved with at a time.
_BLOCKS = 5
# How many tensors of a kind there are at a time while residuals are fitted: attention scores, logits, hidden states and
# inner states of a layer; and while rows are only read.
_SCORES, _LOGITS, _HIDDEN, _INNER = 4, 4, 12, 6


@dataclass(frozen=True)
class Rows:
    """Tokens of the rows of one shard: all that are read, and those from the prompts' last ones on."""

    read: int
    trained: int


def readings(settings: EditSettings) -> int:
    """Return how often each edit is read: bare, in contexts or forms and one held back, and in other words."""
    forms = len(FORM_CONTEXTS) if settings.in_forms else settings.contexts + settings.chat
    return forms + settings.augment + 2


def shard_rows(settings: EditSettings, lengths: Sequence[Length]) -> Rows:
    """Return those of the shard with the longest edits."""
    longest = sorted(lengths, key=sum, reverse=True)[: settings.edits_per_shard]
    ways = readings(settings)
    return Rows(ways * sum(map(sum, longest)), ways * sum(one.target for one in longest))


def kept_bytes(checkpoint: Checkpoint, site: Site, rows: Rows, item: int) -> int:
    """Return the bytes of activations kept of a shard's rows, and of what the layers above need of the prompts."""
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


def fit_bytes(checkpoint: Checkpoint, site: Site, settings: EditSettings, lengths: Sequence[Length], item: int) -> int:
    """Return what the largest batch takes while it is read, or its residuals are fitted through the layers above."""
    shape, above = _attention(checkpoint), layer_count(checkpoint.directory) - site.layer - 1
    most = 0
    for length in lengths:
        whole = sum(length)
        rows = max(1, min(settings.batch_size, BATCH_TOKENS // whole))
        read = rows * whole * (whole * _SCORES + item * (_HIDDEN * site.d + _INNER * site.width))
        states = item * above * (_HIDDEN * site.d + _INNER * site.width)
        scores = 4 * shape.heads * whole * _SCORES
        fitted = rows * length.target * (states + scores + 4 * _LOGITS * shape.vocabulary)
        most = max(most, read, fitted)
    return most


def solve_bytes(site: Site, settings: EditSettings, rows: Rows) -> int:
    """Return the bytes of the closed form's statistics, in float64: squares of columns, and blocks as long as ``W``."""
    if settings.writer != "solve":
        # Whatever shrinks besides is kept as well.
        return 16 * round((1 if settings.weight_decay else settings.mask_ratio) * site.d * site.width)
    if settings.for_lookup:
        return 0
    width = round(settings.mask_ratio * site.width) if settings.mask_kind == "columns" else site.width
    return 8 * (5 * width**2 + 4 * width * site.d + _BLOCKS * rows.trained * (width + site.d))


def routed_bytes(sizes: Sizes, d: int, sent_to: int | None) -> int:
    """Return the bytes of what experts make of a batch: for each expert of a token four states and three inner values.

    Args:
        d: numbers of a state.
        sent_to: how many experts of a layer a token is sent to.
    """
    return BATCH_TOKENS * (sent_to or 1) * (4 * d * sizes.item + sizes.expert // d) if sizes.expert else 0
