"""How a model reads text, loaded without its weights: its tokenizer, and what its config says of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wisecli.config import LoadOptions
from wisecli.errors import DamagedFileError, ModelError, OwnCodeError, WiseError, reason_of
from wisecli.io.checkpoint import EXPORTED_KEY, read_json
from wisecli.models.layout.architectures import architectures, class_config
from wisecli.models.prompts.chat_template import fix_date

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# So much of what transformers says of a model is quoted.
_LONGEST = 300
# Classes of tokenizers that transformers takes by the name that a tokenizer says (without `Fast`), and types of models
# for which it may take another.
_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizer", "GPT2Tokenizer", "GemmaTokenizer", "Qwen2Tokenizer")
_OTHER_TOKENIZERS = ("llava", "phi3", "qwen2")
# Names by which configs say how many tokens a model reads.
_WINDOWS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


class TextInput(NamedTuple):
    """What a model reads texts by: its tokenizer, how many tokens it takes at most, and how many it has rows for.

    Numbers are ``None`` where the model's config says nothing.
    """

    tokenizer: PreTrainedTokenizerBase
    window: int | None
    vocabulary: int | None


def load_tokenizer(directory: Path, load: LoadOptions = LoadOptions()) -> TextInput:
    """Load the tokenizer of a directory, and read from the config what the model takes; no weights are read.

    Raises:
        ModelError: the config or the tokenizer cannot be loaded.
    """
    try:
        if (found := _by_files_alone(directory, load)) is not None:
            return found
        config = base_config(directory, trust_remote_code=load.trust_remote_code)
        return TextInput(tokenizer_of(directory, config, load), context_window(config), vocabulary_size(config))
    except WiseError:
        raise
    except Exception as error:  # whatever a strange config.json or tokenizer makes transformers raise
        raise unloadable(directory, error) from error


def _by_files_alone(directory: Path, load: LoadOptions) -> TextInput | None:
    """Return :func:`load_tokenizer`'s result without torch; ``None`` where only transformers knows the model."""
    config = read_json(directory / "config.json")
    try:
        told = read_json(directory / "tokenizer_config.json")
    except DamagedFileError:
        return None
    window, vocabulary = config.get(_WINDOWS[0]), config.get("vocab_size")
    name, kind = str(told.get("tokenizer_class")), config.get("model_type")
    known = kind in architectures() and kind not in _OTHER_TOKENIZERS and name.removesuffix("Fast") in _TOKENIZERS
    beyond = {EXPORTED_KEY, "auto_map", "text_config"} & (config.keys() | told.keys())
    if not known or beyond or any(type(size) is not int or size <= 0 for size in (window, vocabulary)):
        return None
    import transformers

    tokenizer = getattr(transformers, name).from_pretrained(directory, local_files_only=True)
    fix_date(tokenizer, load.date)
    return TextInput(tokenizer, window, vocabulary)


def context_window(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model reads at most, by its config; ``None`` if that says nothing."""
    found = (getattr(config.get_text_config(), name, None) for name in _WINDOWS)
    return next((size for size in found if type(size) is int and size > 0), None)


def vocabulary_size(config: PretrainedConfig) -> int | None:
    """Return how many rows a model's embedding has, by its config; ``None`` if that says nothing."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if type(size) is int and size > 0 else None


def tokenizer_of(directory: Path, config: PretrainedConfig, load: LoadOptions) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a directory, its chat template set to one date."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(  # nosec B615 # of files of this disk
        directory, config=config, trust_remote_code=load.trust_remote_code, local_files_only=True
    )
    fix_date(tokenizer, load.date)
    return tokenizer


def base_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """Return transformers' config of a directory's model; of an exported one that of its base."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    content = read_json(directory / "config.json")
    exported = content.pop(EXPORTED_KEY, None)
    if not isinstance(exported, dict):
        return class_config(directory, trust_remote_code=trust_remote_code)
    content.pop("auto_map", None)
    content.pop("model_type", None)
    content |= {"architectures": exported["architectures"]}
    if not isinstance(own := exported.get("code"), dict):
        return AutoConfig.for_model(exported["model_type"], **content)
    if not trust_remote_code:
        raise OwnCodeError(directory)
    kind = get_class_from_dynamic_module(str(own["AutoConfig"]), directory, local_files_only=True)
    return kind(**content, auto_map=own)


def unloadable(directory: Path, error: Exception, quantised: str | None = None) -> ModelError:
    """Return the error of a model, quantised perhaps, that transformers gives up with another."""
    reason = reason_of(error)[:_LONGEST]
    if quantised is None:
        return ModelError(f"{directory}: transformers cannot load this model ({reason})")
    return ModelError(
        f"{directory} is quantised ({quantised}), and transformers cannot load it here ({reason}): install what it "
        "asks for, use a machine that has it, or edit the model it was quantised from"
    )
