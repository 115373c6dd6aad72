"""Base models in any form: a directory, a hub id, or a GGUF file, which is converted to plain weights."""

import re
from pathlib import Path

from wisecli.errors import DownloadError, ModelError, reason_of
from wisecli.io.atomic_output import require_space, whole_directory
from wisecli.io.digest import sha256_file
from wisecli.io.user_cache import cache_path
from wisecli.progress import NOTE, Event, ProgressCallback, ignore_progress

# No quantisation of GGUF takes less than two bits a weight, and float32 takes 32.
_GROWTH = 16
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def find_model(model: str, *, revision: str | None = None, on_progress: ProgressCallback = ignore_progress) -> Path:
    """Return the directory of a base model in safetensors; a GGUF file is converted once, into the user's cache.

    Args:
        model: a directory, a hub id, a GGUF file or a directory that holds no other weights than one.

    Raises:
        ModelError: there is no such model, or it cannot be read.
    """
    gguf = gguf_of(Path(model))
    return resolve_model(model, revision=revision) if gguf is None else _converted(gguf, on_progress)


def gguf_of(path: Path) -> Path | None:
    """Return the GGUF file that a path means, if it means one.

    Raises:
        ModelError: it holds several, or one that is in parts.
    """
    if path.is_dir():
        found = [] if any(path.glob("*.safetensors*")) else sorted(path.glob("*.gguf"))
    else:
        found = [path] if path.suffix == ".gguf" and path.is_file() else []
    if any(_PART.search(file.name) for file in found):
        raise ModelError(f"{found[0]} is one of several parts; join them with `llama-gguf-split --merge` first")
    if len(found) > 1:
        raise ModelError(f"{path} holds {len(found)} GGUF files; name the one to edit, as {found[0]}")
    return found[0] if found else None


def _converted(gguf: Path, on_progress: ProgressCallback) -> Path:
    """Return the file's weights in float32, in a directory of the user's cache that is named by the file's content."""
    target = cache_path("models") / f"{gguf.stem}-{sha256_file(gguf)[:16]}"
    on_progress(Event(NOTE, note=f"{gguf} is edited as plain float32 weights, which are kept in {target}"))
    if (target / "config.json").is_file():
        return target
    require_space(target, _GROWTH * gguf.stat().st_size)
    on_progress(Event("conversion"))
    with whole_directory(target, force=True) as working:
        try:
            convert(gguf, working)
        except (ValueError, KeyError, RuntimeError, OSError, NotImplementedError, AttributeError) as error:
            raise ModelError(f"{gguf}: transformers cannot read this GGUF file ({reason_of(error)})") from error
    return target


_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]


def resolve_model(model: str, *, revision: str | None = None, fetch: bool = True) -> Path:
    """Return the directory of a model given as a directory or a hub id (fetched through the hub's own cache).

    Args:
        fetch: whether it may be downloaded if it is not in that cache.

    Raises:
        ModelError: neither a directory nor a hub id that can be fetched.
    """
    path = Path(model)
    if "\0" in model:
        raise ModelError(f"{model!r} is no model directory and no hub id")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json; give a model directory or a hub id")
        return path
    if path.exists() or model.count("/") > 1 or model.startswith(("/", ".")) or model.endswith("/"):
        raise ModelError(f"{model} is no model directory; `wise fetch smollm2-135m -o model/` makes one to try")
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES, local_files_only=not fetch)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelError(
            f"{model} is neither a directory nor a hub id that can be fetched ({reason_of(error)})"
        ) from error
    return Path(directory)


def convert(gguf: Path, output: Path) -> None:
    """Turn a GGUF file into a plain float32 checkpoint with its tokenizer.

    Raises:
        DownloadError: the packages that read GGUF are not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(  # nosec B615 # of files of this disk
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
    except ImportError as error:
        raise DownloadError("reading GGUF needs `pip install 'wisecli[demo]'`") from error
    config = model.config
    del config.quantization_config
    config.name_or_path = ""
    with torch.device("meta"):  # nothing is drawn that is not kept
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 # of files of this disk
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    tokenizer.save_pretrained(output)
