"""Which tensors our files hold: their types and shapes as tables, and the checks that read them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import all_finite
from wisecli.io.json_schema import shown
from wisecli.io.safetensors_header import TensorLayout
from wisecli.routing.deciding.prompt_words import TOKEN_CHARS, WORD_CHARS
from wisecli.routing.deciding.question_words import ASKED_BY
from wisecli.routing.memories.fact_memory import FactMemory

_FLOATS = ("float32", "float16", "bfloat16", "float64")
MISSING = "nothing"
_KINDS = {"float": _FLOATS, "int": ("int64", "int32"), "byte": ("uint8",), "bool": ("bool",), "signed byte": ("int8",)}


@dataclass(frozen=True)
class TensorRow:
    """A tensor of one ``kind`` of numbers; ``dims`` are numbers, or names that stand for the same number in all rows.

    Whole numbers are places: at least zero, and less than the dimension ``below``, where there is one.
    """

    kind: str
    dims: tuple[str | int, ...]
    below: str | None = None


TensorRows = Mapping[str, TensorRow]

TOKEN_PROBE: TensorRows = {"keys": TensorRow("float", ("n", "d_ff")), "lengths": TensorRow("float", ("n",))}
MATRIX: TensorRows = {"columns": TensorRow("int", ("M", "k"), "d_ff"), "delta": TensorRow("float", ("M", "d", "k"))}
HOLDING: TensorRows = {
    "columns": TensorRow("int", ("h", "k"), "d_ff"),
    "delta": TensorRow("float", ("h", "d", "k")),
    "edit_to_matrix": TensorRow("int", ("M",), "h"),
}
LOOKUP: TensorRows = {"residuals": TensorRow("float", ("m", "d")), "key_to_residual": TensorRow("int", ("n",), "m")}
KEY: TensorRows = {
    "whitened_keys": TensorRow("float", ("n", "d_ff")),
    "key_to_edit": TensorRow("int", ("n",), "M"),
    "cosine_offset": TensorRow("float", ("n",)),
    "whitening_index": TensorRow("int", ("n",), "w"),
    "directions": TensorRow("float", ("w", "r", "d_ff")),
    "gains": TensorRow("float", ("w", "r")),
    "floors": TensorRow("float", ("w",)),
}
# The token that each key of an answer was read at, and its place in that; older memories do not say.
KEY_TOKENS: TensorRows = {name: TensorRow("int", ("n",)) for name in ("key_to_token", "key_to_place")}
# Keys as they are stored now, in bytes; ``KEY`` has how older memories store them.
BYTE_KEY: TensorRows = {
    "whitened_keys": TensorRow("signed byte", ("n", "d_ff")),
    "key_scales": TensorRow("float", ("n",)),
}
SUBJECT_MATCH: TensorRows = {
    "subject_match.token_ids": TensorRow("int", ("v",)),
    "subject_match.token_to_word": TensorRow("int", ("v",), "v"),
    "subject_match.name_to_edit": TensorRow("int", ("g",), "M"),
    "subject_match.entry_to_name": TensorRow("int", ("q",), "g"),
    "subject_match.entry_to_word": TensorRow("int", ("q",), "v"),
    "subject_match.word_weights": TensorRow("float", ("q",)),
}
LATE_INTERACTION: TensorRows = {
    "late_interaction.proj_weight": TensorRow("float", (2, "projected", "hidden")),
    "late_interaction.proj_bias": TensorRow("float", (2, "projected")),
    "late_interaction.logit_scale": TensorRow("float", (2,)),
    "late_interaction.logit_offset": TensorRow("float", (2,)),
    "late_interaction.prompt_token_embeddings": TensorRow("float", ("tokens", "projected")),
    "late_interaction.token_to_prompt": TensorRow("int", ("tokens",), "asked twice"),
    "late_interaction.token_weights": TensorRow("float", ("tokens",)),
    "late_interaction.prompt_to_edit": TensorRow("int", ("asked",), "M"),
    "late_interaction.special_token_ids": TensorRow("int", ("special",)),
}


def _gate_rows(gate: str) -> TensorRows:
    """Return the tensors of a request gate of this name."""
    read, attended, seen, values, mixed = (
        f"{dim} of {gate}" for dim in ("read", "attended", "seen", "values", "mixed")
    )
    shapes = {"read": (read, "hidden and 1"), "attend": (attended, seen), "value": (values, seen)}
    shapes |= {"mix": (mixed, f"{values} and 1")}
    return {
        **{f"{gate}.{name}": TensorRow("float", shape) for name, shape in shapes.items()},
        f"{gate}.out": TensorRow("float", (1, f"{mixed} and 1")),
    }


REQUEST_GATE = _gate_rows("request_gate")
# Only some have a deep gate, or say what is known of gates.
DEEP_GATE = _gate_rows("deep_gate")
_OF_GATES: TensorRows = {"heads.mentioned": TensorRow("int", (2,)), "heads.gate_layer": TensorRow("int", (1,))}
SENTENCE_TOKENS: TensorRows = {
    "request_gate.end_token_ids": TensorRow("int", ("end tokens",)),
    "request_gate.question_token_ids": TensorRow("int", ("question tokens",)),
}
WORD_STARTS: TensorRows = {"request_gate.word_starts": TensorRow("byte", ("tokens that start words",))}
PAIRS: TensorRows = {
    "pairs.separator_token_id": TensorRow("int", (1,)),
    "pairs.separators": TensorRow("int", ("M",), "m"),
    "pairs.begins": TensorRow("int", ("M",), "m"),
    "pairs.ends": TensorRow("byte", ("m",)),
    "pairs.usable": TensorRow("byte", ("M",)),
}
FUZZY_MATCH: TensorRows = {
    "fuzzy_match.token_characters": TensorRow("byte", ("vocabulary", TOKEN_CHARS)),
    "fuzzy_match.subject_words": TensorRow("byte", ("spelt", WORD_CHARS)),
    "fuzzy_match.entry_to_word": TensorRow("int", ("spellings",), "spelt"),
    "fuzzy_match.entry_to_edit": TensorRow("int", ("spellings",), "M"),
}
QUESTION_WORDS: TensorRows = {"question_words.asked_by": TensorRow("byte", ("M",))}
HEADS: TensorRows = {
    "heads.proj_weight": TensorRow("float", (2, "k", "hidden")),
    "heads.proj_bias": TensorRow("float", (2, "k")),
    "heads.token_weight": TensorRow("float", (2, "hidden")),
    "heads.token_bias": TensorRow("float", (2,)),
    "heads.logit_scale": TensorRow("float", (2,)),
    "heads.logit_offset": TensorRow("float", (2,)),
    "heads.special_token_ids": TensorRow("int", ("special",)),
    "heads.layer": TensorRow("int", (1,)),
    "heads.unrelated": TensorRow("float", ("unrelated", "hidden")),
    "heads.text": TensorRow("int", ("unrelated",)),
}
PROMPTS: TensorRows = {
    "prompts.states": TensorRow("float", ("tokens", "hidden")),
    "prompts.edit": TensorRow("int", ("tokens",), "edits"),
    "prompts.form": TensorRow("int", ("tokens",)),
    "prompts.subject": TensorRow("bool", ("tokens",)),
}
# Which tokens those are; shards of older versions do not say so.
PROMPT_TOKENS: TensorRows = {"prompts.token": TensorRow("int", ("tokens",))}
EVIDENCE: TensorRows = {
    "evidence.keys": TensorRow("float", ("n", "d_ff")),
    "evidence.residuals": TensorRow("float", ("n", "d")),
    "evidence.edit": TensorRow("int", ("n",), "edits"),
    "evidence.position": TensorRow("int", ("n",)),
    "evidence.context": TensorRow("int", ("n",)),
    "evidence.held_out": TensorRow("bool", ("n",)),
    "evidence.chat": TensorRow("bool", ("n",)),
}
# Evidence that only some shards have: `call` those of the paper's rule, `elsewhere` those of version 0.1, and `token`
# not those of older versions.
SOME_EVIDENCE: TensorRows = {
    **{name: TensorRow("float", ("n",)) for name in ("evidence.call", "evidence.elsewhere")},
    "evidence.token": TensorRow("int", ("n",)),
}
MASKED: dict[str, TensorRows] = {
    "columns": {"mask.indices": TensorRow("int", ("k",), "d_ff"), "delta.values": TensorRow("float", ("d", "k"))},
    "elements": {"mask.indices": TensorRow("int", ("k",), "size"), "delta.values": TensorRow("float", ("k",))},
}


def memory_rows(kind: str, names: Collection[str]) -> TensorRows:
    """Return the tensors of a side memory of a kind, with those optional ones that are among ``names``."""
    if "late_interaction.proj_weight" not in names:
        return MATRIX
    named = SUBJECT_MATCH if "subject_match.token_ids" in names else {}
    gate = {**REQUEST_GATE, "request_gate.logit_offset": TensorRow("float", ("M",))}
    if "deep_gate.read" in names:
        gate |= {**DEEP_GATE, "deep_gate.logit_offset": TensorRow("float", ("M",))}
    pairs = PAIRS if "pairs.ends" in names else {}
    in_bytes = BYTE_KEY if "key_scales" in names else {}
    tokens = KEY_TOKENS if "key_to_token" in names else {}
    held = {**LOOKUP, **KEY, **in_bytes, **tokens, **pairs} if kind == FactMemory.kind else HOLDING
    return {
        **held,
        **LATE_INTERACTION,
        **named,
        **(gate if "request_gate.read" in names else {}),
        **_token_marks(names),
        **(FUZZY_MATCH if named and "fuzzy_match.token_characters" in names else {}),
        **(QUESTION_WORDS if named and ASKED_BY in names else {}),
    }


def _token_marks(names: Collection[str]) -> TensorRows:
    """Return the tensors by which a gate knows sentences and names; older gates know neither, or no names."""
    rows = SENTENCE_TOKENS if "request_gate.end_token_ids" in names else {}
    return {**rows, **(WORD_STARTS if "request_gate.word_starts" in names else {})}


def further_gate_rows(names: Collection[str]) -> TensorRows:
    """Return the tensors of a deep gate, and what is known of gates, as far as they are among ``names``."""
    return {name: row for name, row in {**DEEP_GATE, **_OF_GATES}.items() if name in names}


def background_rows(names: Mapping[str, object]) -> TensorRows:
    """Return the tensors of the statistics of unrelated text, with those optional ones that are among ``names``."""
    rows = {
        "keys": TensorRow("float", ("u", "d_ff")),
        "chat": TensorRow("bool", ("u",)),
        "median_output_norm": TensorRow("float", (1,)),
    }
    for moment in ("tokens", "wording", "chatting"):
        if moment != "chatting" or "chatting.energy" in names:
            rank = f"rank of {moment}"
            rows[f"{moment}.variances"] = TensorRow("float", (rank,))
            rows[f"{moment}.directions"] = TensorRow("float", (rank, "d_ff"))
            rows[f"{moment}.energy"] = TensorRow("float", (1,))
    if "heads.proj_weight" in names:
        rows |= HEADS
    if "request_gate.read" in names:
        rows |= REQUEST_GATE
    rows |= _token_marks(names)
    rows |= further_gate_rows(names)
    if "token_characters" in names:
        rows["token_characters"] = TensorRow("byte", ("vocabulary", TOKEN_CHARS))
    return {**rows, **({"writer_keys": TensorRow("float", ("m", "d_ff"))} if "writer_keys" in names else {})}


def layouts(tensors: Mapping[str, Tensor]) -> dict[str, TensorLayout]:
    """Return the types and shapes of tensors."""
    return {
        name: TensorLayout(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def differences(
    found: Mapping[str, TensorLayout], rows: TensorRows, known: Mapping[str, int]
) -> list[tuple[str, str, str]]:
    """Return the tensors that are not as the table says: their names, what was expected and what was found.

    Args:
        known: dimensions that are certain beforehand.
    """
    sizes = dict(known)
    wrong = [(name, "no such tensor", str(found[name])) for name in found if name not in rows]
    for name, row in rows.items():
        if name not in found:
            wrong.append((name, f"{row.kind} {_spelt(row, sizes)}", MISSING))
            continue
        layout, expected = found[name], f"{row.kind} {_spelt(row, sizes)}"
        fits = len(layout.shape) == len(row.dims) and layout.dtype in _KINDS[row.kind] and 0 not in layout.shape
        for dim, size in zip(row.dims, layout.shape, strict=False):
            fits = fits and size == (dim if isinstance(dim, int) else sizes.get(dim, size))
        if not fits:
            wrong.append((name, expected, str(layout)))
            continue
        sizes |= {dim: size for dim, size in zip(row.dims, layout.shape, strict=True) if isinstance(dim, str)}
    return wrong


def require_layout(path: Path, tensors: Mapping[str, Tensor], rows: TensorRows, known: Mapping[str, int]) -> None:
    """Check types, shapes and places of a file's tensors, and that all their numbers are finite.

    Raises:
        DamagedFileError: naming the tensor, what it should be and what it is.
    """
    for name, expected, found in differences(layouts(tensors), rows, known):
        reason = "is missing" if found == MISSING else f"should be {expected}, not {found}"
        raise DamagedFileError(path, f"tensor {shown(name)[1:-1]} {reason}", "make it anew")
    sizes = dict(known)
    for name, row in rows.items():
        sizes |= {dim: size for dim, size in zip(row.dims, tensors[name].shape, strict=True) if isinstance(dim, str)}
    for name, row in rows.items():
        tensor, limit = tensors[name], sizes.get(row.below or "")
        if row.kind == "float" and not all_finite(tensor):
            raise DamagedFileError(path, f"tensor {name} holds numbers that are not finite", "make it anew")
        if row.kind == "int" and (int(tensor.min()) < 0 or (limit is not None and int(tensor.max()) >= limit)):
            raise DamagedFileError(path, f"tensor {name} points outside of what there is", "make it anew")


def _spelt(row: TensorRow, sizes: Mapping[str, int]) -> str:
    return "×".join(str(sizes.get(dim, dim) if isinstance(dim, str) else dim) for dim in row.dims)
