"""What earlier schemas, ``wise.memory/1`` and ``wise.shards/2``, call tensors and fields.

Files are written with today's names, and read with either: memories, shards, routed checkpoints and cached statistics.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

# Of tensors, without the prefix that they have in a checkpoint.
_TENSORS = {
    "values": "residuals",
    "value": "key_to_residual",
    "probes": "whitened_keys",
    "owner": "key_to_edit",
    "offset": "cosine_offset",
    "metric": "whitening_index",
    "holder": "edit_to_matrix",
    "meaning.turns": "late_interaction.proj_weight",
    "meaning.shifts": "late_interaction.proj_bias",
    "meaning.slopes": "late_interaction.logit_scale",
    "meaning.bars": "late_interaction.logit_offset",
    "meaning.vectors": "late_interaction.prompt_token_embeddings",
    "meaning.asking": "late_interaction.token_to_prompt",
    "meaning.shares": "late_interaction.token_weights",
    "meaning.whose": "late_interaction.prompt_to_edit",
    "meaning.breaks": "late_interaction.special_token_ids",
    "names.tokens": "subject_match.token_ids",
    "names.words": "subject_match.token_to_word",
    "names.whose": "subject_match.name_to_edit",
    "names.named": "subject_match.entry_to_name",
    "names.naming": "subject_match.entry_to_word",
    "names.shares": "subject_match.word_weights",
    "spelling.table": "fuzzy_match.token_characters",
    "spelling.words": "fuzzy_match.subject_words",
    "spelling.naming": "fuzzy_match.entry_to_word",
    "spelling.whose": "fuzzy_match.entry_to_edit",
    **{f"request.{part}": f"request_gate.{part}" for part in ("read", "attend", "value", "mix", "out")},
    "request.bars": "request_gate.logit_offset",
    "heads.turns": "heads.proj_weight",
    "heads.shifts": "heads.proj_bias",
    "heads.weighs": "heads.token_weight",
    "heads.offsets": "heads.token_bias",
    "heads.slopes": "heads.logit_scale",
    "heads.bars": "heads.logit_offset",
    "heads.breaks": "heads.special_token_ids",
    "size": "median_output_norm",
    "letters": "token_characters",
    "against": "writer_keys",
}
# Of a description of a memory: its fields, and what they say.
_FIELDS = {"routing": "pooling", "reads": "state_layer"}
_MARKS = {"opener": "opener_token_ids", "turns": "turn_token_ids", "breaks": "special_token_ids"}
_WORDS = {"meaning": "late-interaction", "sequence": "last"}


def current_name(name: str) -> str:
    """Return today's name of a tensor."""
    return _TENSORS.get(name, name)


def current_names(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Return tensors, or what is known of each, by today's names."""
    return {current_name(name): value for name, value in tensors.items()}


def current_manifest(content: dict[str, Any]) -> dict[str, Any]:
    """Return what a ``router.json`` of schema ``wise.memory/1`` says, in today's words."""
    memory, entries = content.get("memory"), content.get("memories")
    found = {name: value for name, value in content.items() if name != "routing"}
    if isinstance(memory, dict):
        found["memory"] = current_description(memory)
    if isinstance(entries, list):
        found["memories"] = [current_description(entry) if isinstance(entry, dict) else entry for entry in entries]
    return found


def current_description(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description of a side memory, of a manifest or of a checkpoint's config, in today's words.

    Raises:
        ValueError: its edits open in a way of version 0.1 that there is no more.
    """
    renamed = {_FIELDS.get(name, name): value for name, value in described.items()}
    router, pooling = renamed.get("router"), renamed.get("pooling")
    if router == "key" or pooling == "token" or renamed.pop("sharpness", None):
        raise ValueError(
            f"its edits open by router {router!r} with routing {pooling!r}, which there is no more: run "
            "`wise merge` on its shards, which makes a memory of today's kinds"
        )
    said = {name: value for name in ("router", "pooling") if isinstance(value := renamed.get(name), str)}
    renamed |= {name: _WORDS.get(value, value) for name, value in said.items()}
    tensors = renamed.get("tensors")
    return {**renamed, **({"tensors": current_names(tensors)} if isinstance(tensors, dict) else {})}


def current_marks(marks: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the turn marks of a checkpoint's config in today's words; none for ``None``."""
    return {_MARKS.get(name, name): tokens for name, tokens in (marks or {}).items()}
