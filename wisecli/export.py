"""Checkpoints for others: ``routed`` (base, side memory and router together) and ``merged`` (one matrix changed).

A routed checkpoint copies the base's files as they are and adds one small file of tensors, an index over all of them,
the module that routes, and a model type of its own, so that nothing loads it with the memory left out.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from wisecli import memory as memory_module
from wisecli.errors import ModelError
from wisecli.models import EXPORTED_KEY
from wisecli.router import MANIFEST_NAME, Manifest, write_memory
from wisecli.site import load_matrix, stored_weight
from wisecli.storage import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    open_tensors,
    read_json,
    save_tensors,
    sha256_file,
    write_json,
)

CODE_NAME, MEMORY_CODE_NAME = "modeling_wise.py", "wise_memory.py"
BASE_TENSORS, SIDE_TENSORS = "model-base.safetensors", "model-side-memory.safetensors"
# Files of the base directory that are not carried over: other forms of the weights, and what is written anew.
_LEFT_OUT = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_REWRITTEN = ("config.json", "router.json", "README.md", CODE_NAME, MEMORY_CODE_NAME)


def write_routed(output: Path, base: Path, checkpoint: Checkpoint, manifest: Manifest, *, link: bool = False) -> None:
    """Write a routed checkpoint into an empty directory.

    Args:
        link: hard-link the base's weight files instead of copying them.
    """
    place = _linked if link else shutil.copyfile
    names = {path.name: BASE_TENSORS if path.name == SINGLE_NAME else path.name for path in checkpoint.files}
    for path in checkpoint.files:
        place(path, output / names[path.name])
    prefix = _stored(checkpoint, manifest).removesuffix("weight")
    write_memory(output, manifest, file=SIDE_TENSORS, prefix=prefix)
    files = {tensor: names[checkpoint.file_of(tensor)] for tensor in checkpoint}
    files |= {prefix + name: SIDE_TENSORS for name in manifest.memory.tensors}
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    write_json(output / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})
    _write_code(output, base, manifest)
    _copy_side_files(output, base)
    _name_tokenizer(output, base)
    record_digests(output)
    (output / "README.md").write_text(model_card(manifest, "routed"), encoding="utf-8")


def record_digests(output: Path) -> None:
    """Note the sha256 of every file of a routed checkpoint in its ``router.json``."""
    manifest = read_json(output / MANIFEST_NAME)
    files = sorted(path for path in output.iterdir() if path.name != MANIFEST_NAME)
    write_json(output / MANIFEST_NAME, {**manifest, "sha256": {path.name: sha256_file(path) for path in files}})


def write_merged(output: Path, base: Path, checkpoint: Checkpoint, manifest: Manifest, card_note: str) -> None:
    """Write a stock checkpoint in which ``W + Δ`` has taken the place of ``W``.

    Raises:
        ModelError: the memory is a lookup, or holds more than one delta.
    """
    site = manifest.site
    matrix = load_matrix(checkpoint, site)
    changed = (matrix.float() + dense(manifest)).to(matrix.dtype)
    weight = _stored(checkpoint, manifest)
    for path in checkpoint.files:
        if path.name == checkpoint.file_of(weight):
            _rewrite(path, output / path.name, weight, changed.T if site.transposed else changed)
        else:
            shutil.copyfile(path, output / path.name)
    if (base / INDEX_NAME).is_file() and not (base / SINGLE_NAME).is_file():
        shutil.copyfile(base / INDEX_NAME, output / INDEX_NAME)
    shutil.copyfile(base / "config.json", output / "config.json")
    _copy_side_files(output, base)
    (output / "README.md").write_text(model_card(manifest, "merged", card_note), encoding="utf-8")


def dense(manifest: Manifest) -> Tensor:
    """``Δ`` (d, d_ff) of a memory that holds one.

    Raises:
        ModelError: the memory is a lookup, or holds more than one delta.
    """
    site, tensors = manifest.site, manifest.memory.tensors
    if manifest.memory.kind == "lookup":
        raise ModelError("a lookup memory has no matrix to merge; merge with --mode merge, or use --format routed")
    if len(tensors["delta"]) != 1:
        raise ModelError("a memory of several side memories cannot be exported as merged; use --format routed")
    change = torch.zeros(site.d, site.d_ff)
    return change.index_add(1, tensors["columns"][0], tensors["delta"][0].float())


def _stored(checkpoint: Checkpoint, manifest: Manifest) -> str:
    """Name of the edited weight in the checkpoint."""
    return stored_weight(checkpoint, manifest.site.module) or manifest.site.weight


def _rewrite(source: Path, target: Path, name: str, tensor: Tensor) -> None:
    with open_tensors(source) as stream:
        tensors = {other: stream.get_tensor(other) for other in stream.keys()}  # noqa: SIM118 (not a mapping)
        metadata = stream.metadata() or {}
    save_tensors(target, {**tensors, name: tensor}, metadata)


def _linked(source: Path, target: Path) -> None:
    os.link(source.resolve(), target)


def code_files(model_type: str) -> tuple[dict[str, str], dict[str, str]]:
    """Names of transformers' classes for a base of this type, and the custom code of its routed checkpoints, by file.

    Raises:
        ValueError, KeyError: transformers has no causal language model of that type.
    """
    kind = type(AutoConfig.for_model(model_type))
    names = {"config": kind.__name__, "model_type": model_type}
    for name, mapping in (("base", MODEL_MAPPING), ("causal", MODEL_FOR_CAUSAL_LM_MAPPING)):
        names[name] = str(mapping[kind].__name__)  # type: ignore[attr-defined]  # the stubs allow for pairs
    template = resources.files("wisecli").joinpath("data/modeling_wise.py.tmpl").read_text(encoding="utf-8")
    code = Template(template).substitute(names, architecture=names["causal"])
    return names, {CODE_NAME: code, MEMORY_CODE_NAME: Path(str(memory_module.__file__)).read_text(encoding="utf-8")}


def _write_code(output: Path, base: Path, manifest: Manifest) -> None:
    """The routing module, the classes that use it, and the config that names them."""
    config = read_json(base / "config.json")
    model_type = str(config["model_type"])
    names, files = code_files(model_type)
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
    module = CODE_NAME.removesuffix(".py")
    routed: dict[str, Any] = {
        "model_type": model_type,
        "architectures": config.get("architectures"),
        "module": manifest.site.module,
        "transposed": manifest.site.transposed,
        "memory": manifest.memory.describe(),
    }
    auto = {"AutoConfig": "config", "AutoModel": "base", "AutoModelForCausalLM": "causal"}
    config["model_type"] = f"wise_{model_type}"
    config["architectures"] = [f"Wise{names['causal']}"]
    config["auto_map"] = {auto_class: f"{module}.Wise{names[name]}" for auto_class, name in auto.items()}
    write_json(output / "config.json", {**config, EXPORTED_KEY: routed})


def _copy_side_files(output: Path, base: Path) -> None:
    """Tokenizer, chat template, generation settings, licence: whatever else the base directory holds."""
    for path in sorted(base.iterdir()):
        weights = path.name.endswith((".safetensors", *_LEFT_OUT))
        if path.is_file() and not weights and path.name not in _REWRITTEN and not path.name.startswith("."):
            shutil.copyfile(path, output / path.name)


def _name_tokenizer(output: Path, base: Path) -> None:
    """Write down which class reads the tokenizer: for some model types it is another than their files say."""
    path = output / "tokenizer_config.json"
    if not path.is_file():
        return
    try:
        kind = type(AutoTokenizer.from_pretrained(base, local_files_only=True)).__name__
    except (OSError, ValueError):  # it takes code of its own, which comes along
        return
    declared = read_json(path)
    if str(declared.get("tokenizer_class")).removesuffix("Fast") != kind.removesuffix("Fast"):
        write_json(path, {**declared, "tokenizer_class": kind})


def model_card(manifest: Manifest, form: str, note: str = "") -> str:
    """The README of an exported checkpoint."""
    text = resources.files("wisecli").joinpath("data/model_card.md.tmpl").read_text(encoding="utf-8")
    edits = "\n".join(f"| {_cell(edit.prompt)} | {_cell(edit.target)} |" for edit in manifest.edits)
    trust = ", trust_remote_code=True" if form == "routed" else ""
    facts = {"base": manifest.model, "form": form, "module": manifest.site.module, "count": len(manifest.edits)}
    kinds = {"router": manifest.memory.router, "routing": manifest.memory.routing}
    return Template(text).substitute(facts, **kinds, note=note, edits=edits, trust=trust)


def _cell(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("|", "\\|")
