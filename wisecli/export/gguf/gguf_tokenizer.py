"""A tokenizer as llama.cpp's files keep it: tokens, merges, and by which rules text is cut into words before those."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wisecli.errors import ModelError
from wisecli.io.checkpoint import read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Regular expressions that words are cut by before the bytes are looked at, and llama.cpp's name for each.
_BY_PATTERN = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


@dataclass(frozen=True)
class TokenizerData:
    """Byte-level BPE: ``tokens`` and their ``types`` by number, ``merges``, and llama.cpp's name of the ``rules``.

    ``adds_bos`` says whether texts begin with the token ``special["bos"]``.
    """

    rules: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    adds_bos: bool
    chat_template: str | None


def tokenizer_data(directory: Path, vocabulary: int) -> TokenizerData:
    """Return the tokenizer of a model directory.

    Args:
        vocabulary: how many rows the embedding has; numbers without a token are filled up.

    Raises:
        ModelError: it is of a kind that this cannot write down.
    """
    from transformers import AutoTokenizer

    stored = read_json(directory / "tokenizer.json") if (directory / "tokenizer.json").is_file() else {}
    model = stored.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _unknown(directory, "it is no byte-level BPE in tokenizer.json")
    if stored.get("normalizer") not in (None, {"type": "NFC"}):
        raise _unknown(directory, "it changes texts before it cuts them")
    rules = _rules(stored.get("pre_tokenizer"))
    if rules is None:
        raise _unknown(directory, "the rules by which it cuts texts into words have no name in llama.cpp")
    read = AutoTokenizer.from_pretrained(directory, local_files_only=True)  # nosec B615 # of files of this disk
    found = {number: token for token, number in model["vocab"].items()}
    types = dict.fromkeys(found, NORMAL)
    for entry in stored.get("added_tokens", ()):
        found[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    if max(found) >= vocabulary:
        raise _unknown(directory, f"it has more tokens than the model's {vocabulary:,}")
    special = {
        name: number
        for name in ("bos", "eos", "unk", "pad")
        if isinstance(number := getattr(read, f"{name}_token_id"), int)
    }
    return TokenizerData(
        rules,
        tuple(found.get(number, f"[PAD{number}]") for number in range(vocabulary)),
        tuple(types.get(number, UNUSED) for number in range(vocabulary)),
        tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]),
        special,
        "bos" in special and read("a")["input_ids"][:1] == [special["bos"]],
        read.chat_template if isinstance(read.chat_template, str) else None,
    )


def _rules(stored: Any) -> str | None:
    """Return llama.cpp's name of what a tokenizer does before it merges bytes, ``None`` if it has none."""
    steps = stored.get("pretokenizers", [stored]) if isinstance(stored, dict) else []
    step_names = [_step(step) for step in steps]
    if step_names == ["bytes, by GPT-2's words"]:
        return "gpt-2"
    if step_names == ["digits", "bytes, by GPT-2's words"]:
        return "smollm"
    if len(step_names) == 2 and step_names[1] == "bytes":
        return _BY_PATTERN.get(step_names[0])
    return None


def _step(step: Mapping[str, Any]) -> str:
    """Return a step of a pre-tokenizer as a phrase, or as its regular expression; other steps as their JSON."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes, by GPT-2's words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step.get("pattern", {}).get("Regex"))
    return json.dumps(step)


def _unknown(directory: Path, why: str) -> ModelError:
    return ModelError(
        f"the tokenizer of {directory} cannot be written as GGUF: {why}; write --format stock and convert that with "
        "llama.cpp's own converter"
    )
