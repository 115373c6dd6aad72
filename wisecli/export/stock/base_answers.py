"""What the base model makes of unrelated texts that no gate was fitted to; it is kept in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wisecli.data.corpus import texts_beside_gates
from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError
from wisecli.export.stock.one_pass import next_tokens
from wisecli.io.checkpoint import keep_in_cache, load_tensors, save_tensors
from wisecli.io.digest import sha256_json
from wisecli.io.user_cache import cache_path
from wisecli.models.loading import Loaded
from wisecli.models.prompts.prompt_forms import forms
from wisecli.models.prompts.tokenization import Row, encode
from wisecli.models.running.generation import generate
from wisecli.progress import Event, ProgressCallback

_VERSION = 1
# So many unrelated texts are answered, bare and in chat, in so many tokens.
_UNRELATED, LENGTH = 40, 16
_BATCH, _NO_TOKEN = 32, -1
_Tokens = tuple[int, ...]


@dataclass(frozen=True)
class BaseAnswers:
    """What the base model makes of unrelated text: the likeliest token after every one of ``rows``, row by row, and
    of texts that were ``asked`` their tokens with its answers' behind them.
    """

    rows: tuple[Row, ...]
    next_tokens: tuple[_Tokens, ...]
    asked: tuple[Row, ...]


def base_answers(loaded: Loaded, identity: str, edits: Sequence[Edit], on_progress: ProgressCallback) -> BaseAnswers:
    """Return what the base model makes of unrelated texts that no gate was fitted to.

    Args:
        identity: of the base model, for the cache.
        edits: those whose prompts that are to stay as they are count as well.
    """
    tokenizer = loaded.tokenizer
    rows = [Row(tuple(tokenizer(text)["input_ids"]), ()) for text in texts_beside_gates()]
    texts = [text for plain in texts_beside_gates(_UNRELATED) for text in bare_and_in_chat(loaded, plain)]
    asked = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    known, answers = _known(loaded, identity, rows, asked, on_progress)
    probes = [encode(tokenizer, probe.prompt, probe.answer) for edit in edits for probe in edit.locality]
    more = [Row((*pair.prompt, *pair.target), ()) for pair in probes]
    after = [tuple(tokens.tolist()) for tokens in next_tokens(loaded, more, on_progress)]
    whole = tuple(Row(prompt, answer) for prompt, answer in zip(asked, answers, strict=True))
    return BaseAnswers((*rows, *more), (*known, *after), whole)


def bare_and_in_chat(loaded: Loaded, text: str) -> list[str]:
    """Return a text bare and, where there is a template, in chat."""
    names = ("bare", "chat") if loaded.tokenizer.chat_template else ("bare",)
    return [forms()[name].render(loaded.tokenizer, text) for name in names]


def _known(
    loaded: Loaded, identity: str, rows: Sequence[Row], asked: Sequence[_Tokens], on_progress: ProgressCallback
) -> tuple[list[_Tokens], list[_Tokens]]:
    """Return what follows each token of packaged texts, and answers to some, or what the cache remembers."""
    about = [identity, [row.prompt for row in rows], asked, LENGTH, str(loaded.model.dtype), loaded.device.type]
    path = cache_path("gate") / f"{sha256_json([*about, _VERSION])[:32]}.safetensors"
    try:
        kept = load_tensors(path)
        return _tokens(kept["next"]), _tokens(kept["answers"])
    except (DamagedFileError, KeyError):
        on_progress(Event("unrelated answers", 0, len(asked)))
    answers = generate(loaded.model, loaded.tokenizer, asked, max_new_tokens=LENGTH, batch_size=_BATCH, shared=True)
    after = [tokens.tolist() for tokens in next_tokens(loaded, rows, on_progress)]
    kept = {"next": _tensor(after), "answers": _tensor(answers)}
    keep_in_cache(path, lambda working: save_tensors(working, kept))
    return _tokens(kept["next"]), _tokens(kept["answers"])


def _tensor(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return token rows as one tensor."""
    tensor = torch.full((len(rows), max(len(row) for row in rows)), _NO_TOKEN)
    for index, row in enumerate(rows):
        tensor[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tensor


def _tokens(tensor: Tensor) -> list[_Tokens]:
    """Return token rows from one tensor."""
    return [tuple(token for token in row if token != _NO_TOKEN) for row in tensor.tolist()]
