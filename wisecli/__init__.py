"""Edit what a language model knows, without retraining it (WISE, arXiv 2405.14768)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__version__ = "0.2.0.dev0"
__all__ = ["load"]


def load(
    base: str, delta: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base model with a memory in its place, and its tokenizer.

    Args:
        base: directory or hub id of the model that the edits were made on.
        delta: a directory that ``wise merge`` or ``wise export --format delta`` wrote.

    Raises:
        WiseError: either cannot be read, or they do not belong together.
    """
    from wisecli.config import LoadOptions
    from wisecli.evaluation.edited_model import attach

    edited = attach(Path(delta), model=base, load=LoadOptions(device, dtype, trust_remote_code))
    return edited.model, edited.tokenizer
