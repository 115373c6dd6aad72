"""What `save_pretrained` of a loaded routed checkpoint writes: one again, that `wise` knows. Exports carry this file.

Needs transformers and what that needs only. A checkpoint's memory stays a file of its own, beside the base's tensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from wisecli.io.digest import sha256_file, sha256_json, sha256_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object

_MANIFEST, _INDEX, _SEAL = "router.json", "model.safetensors.index.json", "SHA256SUMS"
_SINGLE, _BASE, _SIDE = "model.safetensors", "model-base.safetensors", "model-side-memory.safetensors"
_CONFIG, _MEMORY = "config.json", "wise_memory"
_SIGNATURES = (f"{_SEAL}.sig", f"{_SEAL}.minisig")
# What the export's record becomes: it was not `wise export` that wrote this.
_RECORD = {"format": "routed", "by": "save_pretrained"}
# What `push_to_hub` takes of the arguments of `save_pretrained`, and what says where a file is of `from_pretrained`'s.
_PUSHED = ("commit_message", "create_pr", "max_shard_size", "private", "revision", "token")
_PLACED = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def manifest_of(pretrained_model_name_or_path: Any = None, *_: Any, **given: Any) -> str | None:
    """Return the text of a checkpoint's manifest, by the arguments of ``from_pretrained``; ``None`` without one."""
    if pretrained_model_name_or_path is None:
        return None
    placed = {name: given[name] for name in _PLACED if given.get(name) is not None}
    found = cached_file(
        str(pretrained_model_name_or_path),
        _MANIFEST,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **placed,
    )
    return None if found is None else Path(found).read_text(encoding="utf-8")


class Resaved(_Model):
    """A model that is saved with its manifest, ``wise_manifest``, if it was loaded with one, and with its code.

    ``wise_loaders`` says which class of the code each of transformers' loaders takes.
    """

    wise_manifest: str | None = None
    wise_loaders: Mapping[str, str]

    def save_pretrained(  # type: ignore[override]  # what it adds to the arguments passes through ``named``
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **named: Any,
    ) -> None:
        """Save as every model is; the memory's tensors into their own file, and every digest anew.

        Quantized models, adapters and distributed or offloaded weights are saved as transformers does alone.
        """
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        directory, repository = Path(save_directory), named.pop("repo_id", Path(save_directory).name)
        whole = self._keeps_manifest(tensors, is_main_process, named)
        if whole:
            self._save_whole(directory, tensors, named)
        else:
            super().save_pretrained(directory, is_main_process, state_dict, **named)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            _write_code(directory, self.config.wise, self.wise_loaders)
            if whole:
                _write_manifest(directory, _manifest_for(directory, str(self.wise_manifest)))
        if push_to_hub:
            self.push_to_hub(repository, **{name: named[name] for name in _PUSHED if named.get(name) is not None})

    def _save_whole(self, directory: Path, tensors: dict[str, Tensor], named: dict[str, Any]) -> None:
        """Save the base's tensors as every model's are, and the memory's beside them."""
        within = f"{self.config.wise['module']}."
        prefix, kinds = json.loads(str(self.wise_manifest))["memory"]["prefix"], self.config.wise["memory"]["tensors"]
        memory = {prefix + name: _as_kept(tensors.pop(within + name), kind) for name, (kind, *_) in kinds.items()}
        (directory / _SINGLE).unlink(missing_ok=True)
        super().save_pretrained(directory, state_dict=tensors, **named)
        _write_memory(directory, memory)
        _write_index(directory, memory)

    def _keeps_manifest(self, tensors: Mapping[str, Tensor], is_main_process: bool, named: Mapping[str, Any]) -> bool:
        """Return whether everything that a manifest lists is available and saved unchanged."""
        within = f"{self.config.wise['module']}."
        wanted = [within + name for name in self.config.wise["memory"]["tensors"]]
        here = all(name in tensors and tensors[name].device.type != "meta" for name in wanted)
        otherwise = named.get("variant") or named.get("distributed_checkpoint")
        own = getattr(self, "hf_quantizer", None) is None and not getattr(self, "_hf_peft_config_loaded", False)
        return bool(self.wise_manifest and is_main_process and here and own and not otherwise)


def _write_code(directory: Path, described: dict[str, Any], loaders: Mapping[str, str]) -> None:
    """Write the code that this file is part of, and have the config name it."""
    here = Path(__file__).parent
    for path in here.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copyfile(path, directory / path.name)
    config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    names = [f"Wise{name.removeprefix('Wise')}" for name in config.get("architectures") or ()]
    named = {"architectures": names, "model_type": f"wise_{described['model_type']}", "auto_map": dict(loaders)}
    _write_json(directory / _CONFIG, {**config, **named})


def _manifest_for(directory: Path, text: str) -> dict[str, Any]:
    """Return a saved checkpoint's manifest: the memory has its own file, the base the types that it was saved in."""
    manifest: dict[str, Any] = json.loads(text)
    manifest["memory"]["file"] = _SIDE
    manifest["base"]["matrix"] = _digest_of_base(directory, manifest["site"], manifest["memory"]["prefix"])
    return manifest


def _digest_of_base(directory: Path, site: Mapping[str, Any], prefix: str) -> str:
    """Return the digest of the edited matrix, or of the edited layer's tensors, as the base's fingerprint has it."""
    files = json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    if "transposed" in site:
        matrix = _tensor(directory, files, f"{prefix}weight")
        return sha256_tensor(matrix.T if site["transposed"] else matrix)
    start = prefix.removesuffix(f"{_MEMORY}.")
    names = (name for name in files if name.startswith(start) and not name.startswith(prefix))
    found = sorted([name.removeprefix(start), sha256_tensor(_tensor(directory, files, name))] for name in names)
    return sha256_json(found)


def _tensor(directory: Path, files: Mapping[str, str], name: str) -> Tensor:
    with safe_open(directory / files[name], "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def _as_kept(tensor: Tensor, kind: str) -> Tensor:
    """Return a tensor of the memory in the type that it is kept in; some are used in a wider one."""
    return tensor.detach().cpu().to(getattr(torch, kind)).contiguous()


def _write_memory(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write the memory's tensors, which may still be read from the very file that is to be replaced."""
    new = directory / f".{_SIDE}"
    save_file(tensors, new, {"format": "pt"})
    new.replace(directory / _SIDE)


def _write_index(directory: Path, memory: Iterable[str]) -> None:
    """Write an index over the base's files and the memory's; a single file of the base would be read without it."""
    if (directory / _SINGLE).exists():
        (directory / _SINGLE).replace(directory / _BASE)
        with safe_open(directory / _BASE, "pt") as opened:
            files = dict.fromkeys(opened.keys(), _BASE)
    else:
        files = json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    if _BASE not in files.values():
        (directory / _BASE).unlink(missing_ok=True)
    files |= dict.fromkeys(memory, _SIDE)
    size = sum((directory / name).stat().st_size for name in set(files.values()))
    _write_json(directory / _INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and the list of digests, which says of every file what it is."""
    for name in _SIGNATURES:
        (directory / name).unlink(missing_ok=True)
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    digests = {path.relative_to(directory).as_posix(): sha256_file(path) for path in files}
    for name in (_MANIFEST, _SEAL):
        digests.pop(name, None)
    listed = {name: digest for name, digest in digests.items() if "/" not in name and name != "README.md"}
    _write_json(directory / _MANIFEST, {**manifest, "export": _RECORD, "sha256": listed, "sealed": True})
    digests[_MANIFEST] = sha256_file(directory / _MANIFEST)
    lines = (f"{digests[name]}  {name}\n" for name in sorted(digests))
    (directory / _SEAL).write_bytes("".join(lines).encode(errors="surrogateescape"))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
