"""Checkpoints for others: ``routed`` (base, side memory and router together) and ``merged`` (one matrix changed).

A routed checkpoint copies the base's files as they are and adds one small file of tensors, an index over all of them,
the module that routes, and a model type of its own, so that nothing loads it with the memory left out.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from wisecli.artifacts.checksums import CHECKSUMS, HAS_CHECKSUMS, SIGNATURE_NAMES, write_checksums
from wisecli.artifacts.file_names import MERGED
from wisecli.artifacts.memory_manifest import MANIFEST_NAME, Manifest, write_manifest, write_memory, write_tensors
from wisecli.artifacts.shard import half
from wisecli.edits.checks.signatures import SigningKey
from wisecli.environment import versions
from wisecli.errors import ModelError
from wisecli.export.routed.custom_code import (
    CARRIED_NAMES,
    CODE_NAME,
    FORMER_CODE,
    auto_map,
    base_class,
    code_files,
    own_classes,
)
from wisecli.export.weights import Packing, write_weights
from wisecli.io.checkpoint import (
    EXPORT_RECORD,
    EXPORTED_KEY,
    FETCHED_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    read_json,
    write_json,
)
from wisecli.io.digest import sha256_file
from wisecli.models.layout.architectures import computed_in, loader_name
from wisecli.models.layout.matrix_site import as_matrix
from wisecli.models.prompts.chat_template import turn_marks
from wisecli.routing.deciding.prompt_window import TurnMarks

# What the base's own classes are given in the place of a size: they refuse it at once, and quote it.
_BY_OWN_CODE = "an edited checkpoint: load it by transformers' Auto classes, with trust_remote_code=True"
BASE_TENSORS, SIDE_TENSORS = "model-base.safetensors", "model-side-memory.safetensors"
# Files of the base directory that are not carried over: other forms of the weights, and what is written anew.
_LEFT_OUT = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_REWRITTEN = (
    "config.json",
    "router.json",
    "README.md",
    MERGED,
    FETCHED_NAME,
    CODE_NAME,
    CHECKSUMS,
    *SIGNATURE_NAMES,
    *CARRIED_NAMES,
    *FORMER_CODE,
)


def write_routed(
    output: Path, base: Path, checkpoint: Checkpoint, manifest: Manifest, packing: Packing | None = None
) -> None:
    """Write a routed checkpoint into an empty directory.

    Args:
        packing: how the base's weights are written; as copies of its files by default.
    """
    packing = packing or Packing()
    files = write_weights(output, checkpoint, packing, single=BASE_TENSORS)
    prefix = manifest.site.prefix_in(checkpoint)
    digest = write_tensors(output, manifest, file=SIDE_TENSORS, prefix=prefix)
    files |= {prefix + name: SIDE_TENSORS for name in manifest.memory.tensors}
    write_index(output, files)
    tokenizer = _tokenizer(base)
    marks = TurnMarks() if tokenizer is None else turn_marks(tokenizer)
    _write_code(output, base, manifest, packing, marks)
    copy_side_files(output, base)
    if tokenizer is not None:
        _name_tokenizer(output, tokenizer)
    names = sorted(path.name for path in output.iterdir())
    digests = {name: digest if name == SIDE_TENSORS else sha256_file(output / name) for name in names}
    write_manifest(output, _as_written(manifest, checkpoint, packing), digests, file=SIDE_TENSORS, prefix=prefix)


def _as_written(manifest: Manifest, checkpoint: Checkpoint, packing: Packing) -> Manifest:
    """Return the manifest with the fingerprint that the edited matrix has in the type it is written in."""
    if packing.dtype is None:
        return manifest
    written = manifest.site.digest(checkpoint, packing.dtype)
    return replace(manifest, fingerprint=replace(manifest.fingerprint, matrix=written))


def write_index(output: Path, files: Mapping[str, str]) -> None:
    """Write the index of a checkpoint: the file that each tensor is in."""
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    write_json(output / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})


def write_delta(output: Path, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Write the side memory and its manifest alone, for users that have the base model.

    The change of a matrix in half precision is stored in half precision, too.
    """
    memory = manifest.memory
    if "delta" in memory.tensors and manifest.site.matrix(checkpoint).dtype.itemsize <= 2:
        memory = replace(memory, tensors={**memory.tensors, "delta": half(memory.tensors["delta"])})
    write_memory(output, replace(manifest, memory=memory))


def seal_export(output: Path, record: Mapping[str, Any], key: SigningKey | None = None) -> None:
    """Note in an export's manifest what was asked for, and write the digests of all its files, signed with a key."""
    path = output / (MANIFEST_NAME if (output / MANIFEST_NAME).exists() else MERGED)
    content = read_json(path)
    write_json(path, {**content, EXPORT_RECORD: dict(record), HAS_CHECKSUMS: True})
    digests = {name: str(digest) for name, digest in content.get("sha256", {}).items()}
    write_checksums(output, key, known=digests)


def write_merged(
    output: Path, base: Path, checkpoint: Checkpoint, manifest: Manifest, packing: Packing | None = None
) -> None:
    """Write a stock checkpoint in which ``W + Δ`` has taken the place of ``W``.

    Raises:
        ModelError: the memory is a lookup, or holds more than one delta.
    """
    site, packing = as_matrix(manifest.site), packing or Packing()
    matrix = site.matrix(checkpoint)
    changed = (matrix.float() + dense(manifest)).to(packing.dtype or matrix.dtype)
    replaced = {site.stored(checkpoint): changed.T if site.transposed else changed}
    files = write_weights(output, checkpoint, packing, replaced=replaced)
    if set(files.values()) != {SINGLE_NAME}:
        write_index(output, files)
    write_json(output / "config.json", typed_config(read_json(base / "config.json"), packing))
    copy_side_files(output, base)
    edits = [edit.as_dict() for edit in manifest.edits]
    write_json(output / MERGED, {"format": "merged", "versions": versions(), "edits": edits})


def typed_config(config: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """Return a config that names the type its weights are written in."""
    if packing.dtype is None:
        return config
    spelling = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, spelling: str(packing.dtype).removeprefix("torch.")}


def dense(manifest: Manifest) -> Tensor:
    """Return ``Δ`` (d, d_ff) of a memory that holds one.

    Raises:
        ModelError: the memory is a lookup, or holds more than one delta.
    """
    site, tensors = manifest.site, manifest.memory.tensors
    if "delta" not in tensors:
        raise ModelError("a lookup memory has no matrix to merge; merge with --mode merge, or use --format routed")
    if len(tensors["delta"]) != 1:
        raise ModelError("a memory of several side memories cannot be exported as merged; use --format routed")
    change = torch.zeros(site.d, site.width)
    return change.index_add(1, tensors["columns"][0], tensors["delta"][0].float())


def _write_code(output: Path, base: Path, manifest: Manifest, packing: Packing, marks: TurnMarks) -> None:
    """Write the routing module, the classes that use it, and the config that names them."""
    config = typed_config(read_json(base / "config.json"), packing)
    if packing.dtype is None and (dtype := computed_in(Checkpoint(base))):
        config |= {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}
    model_type = str(config["model_type"])
    own = own_classes(model_type, config.get("auto_map"))
    for name, text in code_files(model_type, own).items():
        (output / name).write_text(text, encoding="utf-8")
    routed: dict[str, Any] = {
        "model_type": model_type,
        "architectures": config.get("architectures"),
        "loader": loader_name(model_type),
        **manifest.site.described(),
        "memory": manifest.memory.describe(),
        "marks": marks.as_dict(),
    }
    routed |= {"code": own} if own else {}
    routed |= dict.fromkeys(_sizes_named(config), _BY_OWN_CODE)
    config["model_type"] = f"wise_{model_type}"
    config["architectures"] = [f"Wise{base_class(model_type, own)}"]
    config["auto_map"] = auto_map(model_type)
    write_json(output / "config.json", {**config, EXPORTED_KEY: routed})


def _tokenizer(base: Path) -> PreTrainedTokenizerBase | None:
    """Return a base's tokenizer, of which no code runs, nor of the base; ``None`` if it takes that, or is elsewhere."""
    content = read_json(base / "config.json")
    # Which class reads a tokenizer is asked of configs that transformers has.
    config = PretrainedConfig() if own_classes(str(content.get("model_type")), content.get("auto_map")) else None
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(  # nosec B615 # of files of this disk
            base, config=config, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None
    return found


def _sizes_named(config: dict[str, Any]) -> list[str]:
    """Return the names by which the base's own config class says how large the model is.

    That class takes an entry of a config with its model type for its settings. It would find no sizes there, build a
    model of the default ones, seven billion weights for some, and only then see that no tensor fits.
    """
    return [name for name in ("n_embd", "text_config") if name in config] or ["hidden_size"]


def copy_side_files(output: Path, base: Path) -> None:
    """Copy tokenizer, chat template, generation settings, licence: whatever else the base directory holds."""
    for path in side_files(base):
        shutil.copyfile(path, output / path.name)


def side_files(base: Path) -> list[Path]:
    """Return the files of a base model that go into its checkpoints as they are."""
    return [
        path
        for path in sorted(base.iterdir())
        if path.is_file()
        and not path.name.endswith((".safetensors", *_LEFT_OUT))
        and path.name not in _REWRITTEN
        and not path.name.startswith(".")
    ]


def _name_tokenizer(output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write down which class reads the tokenizer: for some model types it is another than their files say."""
    path = output / "tokenizer_config.json"
    if not path.is_file():
        return
    declared, kind = read_json(path), type(tokenizer).__name__
    if str(declared.get("tokenizer_class")).removesuffix("Fast") != kind.removesuffix("Fast"):
        write_json(path, {**declared, "tokenizer_class": kind})
