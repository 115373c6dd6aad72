"""Background activation statistics: what a base model makes of text that no edit may touch, and their file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.former_names import current_names
from wisecli.artifacts.shard import half
from wisecli.artifacts.tensor_schema import HEADS, background_rows, further_gate_rows, require_layout
from wisecli.artifacts.tensor_schema import REQUEST_GATE as GATE_ROWS
from wisecli.artifacts.tensor_schema import SENTENCE_TOKENS as SENTENCE_ROWS
from wisecli.artifacts.tensor_schema import WORD_STARTS as START_ROWS
from wisecli.io.checkpoint import load_tensors, save_tensors
from wisecli.routing.gating.request_gate import DEEP_GATE, REQUEST_GATE, TOKEN_MARKS
from wisecli.routing.memories.whitening import Moment

_MOMENTS = ("tokens", "wording", "chatting")


_VERSION = 10


@dataclass(frozen=True)
class Projections:
    """What late interaction compares of states, and how it weighs it.

    ``proj_weight`` (2, k, d) and ``proj_bias`` (2, k) project states x of tokens, for subjects and for relations.
    ``token_weight`` (2, d) and ``token_bias`` (2,) say how much each token of an edit counts, ``softplus(token_weight ·
    x + token_bias)``. ``logit_scale`` (2,) and ``logit_offset`` (2,) make probabilities of scores.
    """

    proj_weight: Tensor
    proj_bias: Tensor
    token_weight: Tensor
    token_bias: Tensor
    logit_scale: Tensor
    logit_offset: Tensor

    def project(self, states: Tensor, head: int) -> Tensor:
        """Return states (n, d) under one projection, of length 1: (n, k)."""
        return F.normalize(F.linear(states.float(), self.proj_weight[head], self.proj_bias[head]), dim=-1)

    def token_weights(self, states: Tensor, head: int) -> Tensor:
        """Return how much each of the tokens of a prompt (n, d) counts: (n,)."""
        weights = F.softplus(states.float() @ self.token_weight[head] + self.token_bias[head])
        return weights / weights.sum().clamp(min=1e-6)


@dataclass(frozen=True)
class RouterHeads(Projections):
    """How the subject and the relation of a prompt are read off the states that leave layer ``layer`` (1,).

    ``special_token_ids`` (b,) are the tokenizer's special tokens. ``unrelated`` (u, d) are the states of tokens of
    unrelated texts, ``text`` (u,) says of which. ``request_gate`` are the tensors of the router's request gate, if one
    was learned, and of the deep gate, which reads layer ``gate_layer`` (1,); ``mentioned`` (2,) are how many of some
    prompts that mention a made-up fact and don't ask it open it all the same, and of how many.
    """

    special_token_ids: Tensor
    layer: Tensor
    unrelated: Tensor
    text: Tensor
    request_gate: Mapping[str, Tensor] = field(default_factory=dict)
    mentioned: Tensor | None = None
    gate_layer: Tensor | None = None

    def reads(self, router_layer: int, gate_layer: int | None) -> bool:
        """Return whether its router reads the states of this layer, and its deep gate, if any, of that one."""
        gate = None if self.gate_layer is None else int(self.gate_layer)
        return (int(self.layer), gate) == (router_layer, gate_layer)

    def tensors(self) -> dict[str, Tensor]:
        """Return its parts, by their names in files."""
        named = {f"heads.{name}": getattr(self, name) for name in (*_HEADS, *_OF_GATE)}
        return {name: tensor for name, tensor in named.items() if tensor is not None} | dict(self.request_gate)


# Those parts of heads that are always there.
_HEADS = (
    *("proj_weight", "proj_bias", "token_weight", "token_bias", "logit_scale", "logit_offset"),
    *("special_token_ids", "layer", "unrelated", "text"),
)
# Those that are there with some gates.
_OF_GATE = ("mentioned", "gate_layer")


@dataclass(frozen=True)
class BackgroundStats:
    """Keys (n, d_ff) that no writer sees, for calibration; the moments of all tokens and of wording.

    ``chat`` (n,) marks keys of answers in the chat template, from their prompts' last token on. They are few, and have
    a false-alarm rate of their own. ``chatting`` is the moment of wording
    among such prompts, if the model was asked in its template.
    ``median_output_norm`` (1,) is the median of ``‖W a‖₂``, the unit for residuals and margins. ``writer_keys`` (m,
    d_ff) are those that writers may look at; they stay with ``wise edit`` and are not written into shards. ``heads``
    were learned if prompts are to be routed by what they mean; ``token_characters`` (v, ``TOKEN_CHARS``) are then those
    of every token, as :mod:`~wisecli.routing.deciding.fuzzy_match` reads them.
    """

    keys: Tensor
    chat: Tensor
    tokens: Moment
    wording: Moment
    median_output_norm: Tensor
    writer_keys: Tensor
    chatting: Moment | None = None
    heads: RouterHeads | None = None
    token_characters: Tensor | None = None


def save_background(path: Path, unrelated: BackgroundStats, *, whole: bool = False) -> None:
    """Write the statistics; with ``whole``, the writers' keys as well."""
    tensors = {"keys": half(unrelated.keys), "chat": unrelated.chat, "median_output_norm": unrelated.median_output_norm}
    for name in _MOMENTS:
        if (moment := getattr(unrelated, name)) is not None:
            tensors |= {f"{name}.{part}": getattr(moment, part) for part in Moment.__dataclass_fields__}
    if unrelated.heads is not None:
        tensors |= unrelated.heads.tensors()
    if unrelated.token_characters is not None:
        tensors["token_characters"] = unrelated.token_characters
    if whole:
        tensors["writer_keys"] = half(unrelated.writer_keys)
    save_tensors(path, tensors, {"wise.unrelated": json.dumps({"version": _VERSION})})


def load_background(path: Path, digest: str, *, d_ff: int | None = None) -> BackgroundStats:
    """Read ``unrelated.safetensors``.

    Args:
        d_ff: how long its keys must be, if that is known.

    Raises:
        DamagedFileError: it is truncated, altered, or of other keys.
    """
    return _from_tensors(load_tensors(path, digest=digest), path, d_ff)


def _from_tensors(tensors: dict[str, Tensor], path: Path, d_ff: int | None) -> BackgroundStats:
    """Return the statistics that a file's tensors hold, under today's names, once their shapes are checked."""
    tensors = current_names(tensors)
    require_layout(path, tensors, background_rows(tensors), {} if d_ff is None else {"d_ff": d_ff})

    def moment(name: str) -> Moment:
        return Moment(*(tensors[f"{name}.{part}"] for part in Moment.__dataclass_fields__))

    keys = tensors["keys"].float()
    writer_keys = tensors.get("writer_keys", keys[:0]).float()
    chatting = moment("chatting") if "chatting.energy" in tensors else None
    moments = moment("tokens"), moment("wording")
    learned = _heads_in(tensors), tensors.get("token_characters")
    return BackgroundStats(
        keys, tensors["chat"], *moments, tensors["median_output_norm"], writer_keys, chatting, *learned
    )


def load_heads(path: Path, further: Mapping[str, Tensor] = MappingProxyType({})) -> RouterHeads | None:
    """Read the heads that a file holds together with their gate; ``None`` if it holds no heads.

    Args:
        further: tensors of heads that the file is without, by their names in files.

    Raises:
        DamagedFileError: it is missing, truncated, or holds other tensors.
    """
    tensors = current_names(load_tensors(path)) | dict(further)
    rows = {**HEADS, **GATE_ROWS, **SENTENCE_ROWS, **START_ROWS, **further_gate_rows(tensors)}
    require_layout(path, tensors, rows, {})
    return _heads_in(tensors)


def _heads_in(tensors: dict[str, Tensor]) -> RouterHeads | None:
    """Return the router's learned projections among a file's tensors, or ``None`` if it has none."""
    if "heads.proj_weight" not in tensors:
        return None
    gate = {name: tensors[name] for name in (*REQUEST_GATE, *DEEP_GATE, *TOKEN_MARKS) if name in tensors}
    parts = {name: tensors[f"heads.{name}"] for name in _HEADS}
    mentioned, gate_layer = (tensors.get(f"heads.{name}") for name in _OF_GATE)
    return RouterHeads(**parts, request_gate=gate, mentioned=mentioned, gate_layer=gate_layer)
