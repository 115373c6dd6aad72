"""A base model with its tokenizer, loaded from a model directory or from one that ``wise export`` wrote."""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wisecli.config import LoadOptions
from wisecli.errors import ModelError, SettingsError, WiseError, WrongBaseError
from wisecli.io.checkpoint import EXPORTED_KEY, Checkpoint, read_json
from wisecli.io.json_schema import shown
from wisecli.models.layout.architectures import computed_in, known_layout, layer_count, loader_name, quantisation_of
from wisecli.models.layout.site import Fingerprint, Site
from wisecli.models.layout.site_interface import NOTHING
from wisecli.models.prompts.tokenization import without_row
from wisecli.models.streaming.memory_budget import spool_bytes
from wisecli.models.text_input import base_config, tokenizer_of, unloadable, vocabulary_size

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from wisecli.models.streaming.layer_stream import LayerStream

# Types that a model can be run in, if not in the checkpoint's own.
_DTYPES = ("float32", "bfloat16", "float16")
# Names of the scales of quantised weights.
_SCALES = re.compile(r"\b(weight|input|\w+_proj)_scale(_inv)?$")
# Of these files Linux has one where there is a GPU.
_GPUS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, in evaluation mode and frozen; with a ``stream`` its layers are read as they run."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stream: LayerStream | None = None

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.device


def pick_device(device: str) -> torch.device:
    """Turn ``--device`` into a device; ``auto`` takes a GPU where there is one.

    Raises:
        SettingsError: there is no such device here.
    """
    import torch  # takes seconds, which a tokenizer alone need not wait

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"--device {device} cannot be used here ({reason}); try cpu") from None
    return chosen


def device_memory(device: str) -> int:
    """Return the bytes of memory that ``--device`` has; torch is asked only where there may be a GPU.

    Raises:
        SettingsError: there is no such device here.
    """
    if device == "auto" and sys.platform == "linux" and not any(map(os.path.exists, _GPUS)):
        device = "cpu"
    return _ram() if device == "cpu" else machine_memory(pick_device(device))


def machine_memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[1])
    return _ram()


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pick_dtype(dtype: str) -> torch.dtype | str:
    """Turn ``--dtype`` into a type; ``auto`` is the checkpoint's own.

    Raises:
        SettingsError: no such type.
    """
    require_dtype(dtype)
    if dtype == "auto":
        return dtype
    import torch

    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def require_dtype(dtype: str) -> None:
    """Check that ``--dtype`` names a type.

    Raises:
        SettingsError: no such type.
    """
    if dtype not in ("auto", *_DTYPES):
        raise SettingsError(f"--dtype must be one of auto, {', '.join(_DTYPES)}, not {dtype!r}")


def load_model(directory: Path, load: LoadOptions = LoadOptions(), *, layers: str | None = None) -> Loaded:
    """Load the base model and the tokenizer of a directory. Only safetensors are read, and no code of the directory
    runs unless it is trusted; of an exported directory the base model is loaded, without its memory.

    Args:
        load: all but its ``revision``; a model that does not fit into its ``memory_budget`` has its layers streamed.
        layers: module path of the list of layers, where the table's is not meant.

    Raises:
        ModelError: the model cannot be loaded, or lacks tensors that would be drawn at random.
    """
    _require_layers(directory)
    checkpoint, device, dtype = Checkpoint(directory), pick_device(load.device), pick_dtype(load.dtype)
    if dtype == "auto":
        dtype = pick_dtype(computed_in(checkpoint) or dtype)
    quantised = quantisation_of(read_json(directory / "config.json"))
    budget = load.memory_budget or machine_memory(device)
    room = spool_bytes(checkpoint, dtype, budget)
    try:
        config = base_config(directory, trust_remote_code=load.trust_remote_code)
        packed = quantised is not None and not _made_plain(config, device)
        if packed and load.memory_budget is not None and room is not None:
            raise ModelError(
                f"{directory} is quantised, and its layers are not read one by one here; leave out --memory-budget"
            )
        read = _reader(directory, config, dtype, load)
        if room is None or packed:
            # Some that are quantised must be loaded where they run.
            model, info = read(**({} if quantised is None else {"device_map": {"": device}}))
            stream = None
        else:
            from wisecli.models.streaming.streamed_loading import load_streamed

            path = layers or known_layout(directory).layers
            empty = _drawn(config, load)
            model, info, stream = load_streamed(read, empty, checkpoint, path, device, budget)
        tokenizer = tokenizer_of(directory, config, load)
    except WiseError:
        raise
    except Exception as error:  # whatever a strange config.json or tokenizer makes transformers raise
        raise unloadable(directory, error, quantised) from error
    _require_whole(directory, model, info, quantised)
    if stream is None and quantised is None:
        model.to(device)
    _refuse_unknown_tokens(model, tokenizer)
    return Loaded(model.eval().requires_grad_(False), tokenizer, stream)


def _reader(directory: Path, config: Any, dtype: torch.dtype | str, load: LoadOptions) -> partial[Any]:
    """Return the call of transformers that reads a model and says what its checkpoint lacks."""
    import transformers

    return partial(
        getattr(transformers, loader_name(config.model_type)).from_pretrained,
        directory,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=load.trust_remote_code,
        local_files_only=True,
    )


def _drawn(config: PretrainedConfig, load: LoadOptions) -> PreTrainedModel:
    """Return a model on the meta device."""
    import torch
    import transformers

    with torch.device("meta"):
        loader = getattr(transformers, loader_name(config.model_type))
        model: PreTrainedModel = loader.from_config(copy.deepcopy(config), trust_remote_code=load.trust_remote_code)
    return model


def _require_whole(directory: Path, model: PreTrainedModel, info: Mapping[str, Any], quantised: str | None) -> None:
    """Check that no tensor was drawn at random, and that no scales of weights were left aside.

    Args:
        info: what transformers says of how it loaded the model.
        quantised: how the weights are quantised, by the model's config.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if lost := sorted(info["missing_keys"]):
        if len(lost) == len(list(model.parameters())):
            kind = type(model).__name__
            raise ModelError(
                f"{directory}: {kind} of transformers knows none of its tensors by name; edit another model"
            )
        raise ModelError(f"{directory}: the checkpoint lacks {_first(lost)}; copy it anew")
    scales = sorted(name for name in info["unexpected_keys"] if _SCALES.search(name))
    if scales and str(quantised) not in map(shown, AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise ModelError(
            f"{directory} is quantised in a way that its config.json does not name or transformers does not know, and "
            f"would be loaded without {_first(scales)}; edit the model it was quantised from, or a copy that "
            "transformers loads with its scales"
        )


def _refuse_unknown_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a model whose tokenizer has more tokens than embedding rows refuse those, by name, when it is given any."""
    vocabulary = vocabulary_size(model.config)
    if vocabulary is None or max(tokenizer.get_vocab().values(), default=0) < vocabulary:
        return

    def require(_module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        if given and (wrong := without_row(tokenizer, given[0].flatten().tolist(), vocabulary)):
            raise ModelError(wrong)

    model.get_input_embeddings().register_forward_pre_hook(require)


def _made_plain(config: PretrainedConfig, device: torch.device) -> bool:
    """Turn the weights of a quantised model into plain numbers on a CPU, for which most kinds have no kernels.

    Returns whether they do: not every kind can.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    settings = getattr(config, "quantization_config", None) or {}
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(settings.get("quant_method")))
    if device.type != "cpu" or kind is None or "dequantize" not in inspect.signature(kind).parameters:
        return False
    config.quantization_config = {**settings, "dequantize": True}
    return True


def _require_layers(directory: Path) -> None:
    """Refuse a config with more layers than the checkpoint can fill, before any of them is built."""
    tensors = sum(1 for _ in Checkpoint(directory))
    parts = [part for part in read_json(directory / "config.json").values() if isinstance(part, dict)]
    towers = [part[name] for part in parts for name in ("num_hidden_layers", "depth") if type(part.get(name)) is int]
    if max(layer_count(directory), *towers, 0) > tensors:
        raise ModelError(f"{directory}: config.json speaks of more layers than there are tensors ({tensors})")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def is_exported(directory: Path) -> bool:
    """Return whether a directory was written by ``wise export --format routed``."""
    return (directory / "config.json").is_file() and EXPORTED_KEY in read_json(directory / "config.json")


def require_base(directory: Path, checkpoint: Checkpoint, site: Site, expected: Fingerprint) -> None:
    """Check that a directory holds the base model that shards or a memory were made from.

    Raises:
        WrongBaseError: what is edited of it differs.
    """
    amiss = site.mismatch(checkpoint)
    if amiss is not None and amiss.found == NOTHING:
        raise WrongBaseError(f"{directory} has no {amiss.name}; pass the base model with --model")
    if amiss is not None or site.digest(checkpoint) != expected.matrix:
        raise WrongBaseError(
            f"{directory} is not the base model: its {site.base_name} differs from the one the edits were made on; "
            "pass that model with --model, or edit anew"
        )
