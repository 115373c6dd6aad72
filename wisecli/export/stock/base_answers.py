"""What the base model makes of unrelated texts that no router was fitted to; it is kept in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wisecli.data.corpus import texts_to_measure_with
from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import keep_in_cache, load_tensors, save_tensors
from wisecli.io.digest import sha256_json
from wisecli.io.user_cache import cache_path
from wisecli.models.loading import Loaded
from wisecli.models.prompts.prompt_forms import forms
from wisecli.models.prompts.tokenization import Row, encode
from wisecli.models.running.generation import generate
from wisecli.models.running.shrinking_batches import unedited_beginnings
from wisecli.progress import Event, ProgressCallback

_VERSION = 1
# So many unrelated texts are answered, bare and in chat, in so many tokens.
_UNRELATED, LENGTH = 40, 16
_BATCH, _NO_TOKEN = 32, -1
_Tokens = tuple[int, ...]


@dataclass(frozen=True)
class BaseAnswers:
    """Unrelated texts with the base model's next tokens and answers.

    After each token of ``rows`` the likeliest next token should stay the base model's. ``asked`` are prompts, whose
    targets are the base model's answers.
    """

    rows: tuple[Row, ...]
    asked: tuple[Row, ...]


def base_answers(loaded: Loaded, identity: str, edits: Sequence[Edit], on_progress: ProgressCallback) -> BaseAnswers:
    """Return unrelated texts that no router was fitted to, and what the base model answers to some of them.

    Args:
        identity: of the base model, for the cache.
        edits: those whose prompts that are to stay as they are count as well.
    """
    tokenizer = loaded.tokenizer
    rows = [Row(tuple(tokenizer(text)["input_ids"]), ()) for text in texts_to_measure_with()]
    probes = [encode(tokenizer, probe.prompt, probe.answer) for edit in edits for probe in edit.locality]
    rows += [Row((*pair.prompt, *pair.target), ()) for pair in probes]
    texts = [text for plain in texts_to_measure_with(_UNRELATED) for text in bare_and_in_chat(loaded, plain)]
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    answers = _answers(loaded, identity, prompts, on_progress)
    return BaseAnswers(tuple(rows), tuple(Row(*pair) for pair in zip(prompts, answers, strict=True)))


def bare_and_in_chat(loaded: Loaded, text: str) -> list[str]:
    """Return a text bare and, if there is a chat template, as a user's turn."""
    names = ("bare", "chat") if loaded.tokenizer.chat_template else ("bare",)
    return [forms()[name].render(loaded.tokenizer, text) for name in names]


def _answers(loaded: Loaded, identity: str, prompts: Sequence[_Tokens], on_progress: ProgressCallback) -> list[_Tokens]:
    """Return the base model's answers to prompts, or what the cache remembers."""
    about = [identity, prompts, LENGTH, str(loaded.model.dtype), loaded.device.type, _VERSION]
    path = cache_path("gate") / f"{sha256_json(about)[:32]}.safetensors"
    try:
        return _tokens(load_tensors(path)["answers"])
    except (DamagedFileError, KeyError):
        on_progress(Event("unrelated answers", 0, len(prompts)))
    answers = generate(
        loaded.model,
        loaded.tokenizer,
        prompts,
        max_new_tokens=LENGTH,
        batch_size=_BATCH,
        beginnings=unedited_beginnings(loaded.model),
    )
    rows = [torch.tensor(answer, dtype=torch.long) for answer in answers]
    kept = {"answers": pad_sequence(rows, batch_first=True, padding_value=_NO_TOKEN)}
    keep_in_cache(path, lambda working: save_tensors(working, kept))
    return _tokens(kept["answers"])


def _tokens(tensor: Tensor) -> list[_Tokens]:
    """Return the rows of a padded tensor without the padding."""
    return [tuple(token for token in row if token != _NO_TOKEN) for row in tensor.tolist()]
