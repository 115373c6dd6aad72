"""A routed checkpoint whose lookup counts several times, as if it held so many more edits."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MEMORY_FILE = "model-side-memory.safetensors"
# Tensors of a lookup that number others, and the tensor or the number of edits that they count in.
_NUMBERED = {
    "key_to_residual": "residuals",
    "key_to_edit": "edits",
    "late_interaction.prompt_to_edit": "edits",
    "subject_match.name_to_edit": "edits",
    "subject_match.entry_to_name": "subject_match.name_to_edit",
    "fuzzy_match.entry_to_edit": "edits",
    "fuzzy_match.entry_to_word": "fuzzy_match.subject_words",
}
# Tensors with a row for each key, prompt, word or edit.
_OF_KEYS = (
    *("residuals", "whitened_keys", "key_scales", "cosine_offset", "whitening_index"),
    *("key_to_token", "key_to_place"),
)
_ROWS = {
    *_OF_KEYS,
    "late_interaction.prompt_token_embeddings",
    "late_interaction.token_weights",
    "subject_match.entry_to_word",
    "subject_match.word_weights",
    "fuzzy_match.subject_words",
    "question_words.asked_by",
    "request_gate.logit_offset",
    "deep_gate.logit_offset",
}


def several(checkpoint: Path, times: int) -> Path:
    """Return a checkpoint, or if it is to count several times another one that does, as long as the program runs."""
    if times == 1:
        return checkpoint
    around = Path(tempfile.mkdtemp(dir=checkpoint.resolve().parent))  # on the same disk, as weights are linked
    atexit.register(shutil.rmtree, around)
    return multiplied(checkpoint, times, around / f"{checkpoint.name}-{times}")


def multiplied(checkpoint: Path, times: int, output: Path) -> Path:
    """Write a checkpoint whose edits are those of another, so many times each; weights are linked."""
    output.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name not in (MEMORY_FILE, "config.json"):
            os.link(file.resolve(), output / file.name)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    memory = config["wise"]["memory"]
    prefix = config["wise"]["module"] + "."
    stored = load_file(checkpoint / MEMORY_FILE)
    own = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    grown = _repeated(own, len(memory["thresholds"]), times)
    save_file({f"{prefix}{name}": tensor for name, tensor in grown.items()}, output / MEMORY_FILE, {"format": "pt"})
    memory["thresholds"] *= times
    memory["tensors"] = {name: [memory["tensors"][name][0], *tensor.shape] for name, tensor in grown.items()}
    (output / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return output


def _repeated(tensors: dict[str, Tensor], edits: int, times: int) -> dict[str, Tensor]:
    grown: dict[str, Any] = dict(tensors)
    copies = torch.arange(times)[:, None]
    for name in _ROWS & set(tensors):
        grown[name] = tensors[name].repeat(times, *[1] * (tensors[name].dim() - 1))
    for name in _NUMBERED.keys() & set(tensors):
        counted = _NUMBERED[name]
        step = edits if counted == "edits" else len(tensors[counted])
        grown[name] = (tensors[name] + (copies * step).to(tensors[name].dtype)).flatten()
    # Prompts looked for as relations come behind all that are looked for as subjects.
    name, prompts = "late_interaction.token_to_prompt", len(tensors["late_interaction.prompt_to_edit"])
    relation = (tensors[name] >= prompts).long() * prompts
    grown[name] = (tensors[name] - relation + copies * prompts + relation * times).to(tensors[name].dtype).flatten()
    return grown
