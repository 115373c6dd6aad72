"""A tiny bench, and what holds for every method: nothing stays changed, and batches and caches change no answer."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from support.helpers import random_rows, save_tiny
from support.loading import CPU
from wisecli.bench.methods.base import Bench, Method
from wisecli.bench.methods.evaluation import target_predictions
from wisecli.edits.reading.record_fields import EvaluationPrompt
from wisecli.edits.record import Edit
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import known_layout
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import Row, encode

EDITS = [
    Edit("one", "ba be bi", "do"),
    Edit("two", "ka ke ki ko ku", "fa fe"),
    Edit("three", "ma me", "ga"),
    Edit("four", "ta te ti to", "la le"),
]
TRAIN = [
    Edit("a", "pa pe pi", "po", rephrases=("pe pi pa",), locality=(EvaluationPrompt("ra re", "ri"),)),
    Edit("b", "sa se si", "so", rephrases=("si sa se",), locality=(EvaluationPrompt("va ve", "vi"),)),
    Edit("c", "za ze zi", "zo", rephrases=("zi ze za",), locality=(EvaluationPrompt("na ne", "ni"),)),
]
TEXTS = ["ro ru ra", "vo vu va ve", "no nu"]


def tiny_bench(directory: Path, architecture: str = "llama", *, train: Sequence[Edit] = TRAIN) -> Bench:
    """A tiny checkpoint, loaded."""
    save_tiny(directory, architecture)
    loaded = load_model(directory, load=CPU)
    return Bench(loaded, Checkpoint(directory), known_layout(directory), train, TEXTS, batch_size=3)


def encoded(bench: Bench, edit: Edit) -> Row:
    """An edit as a row."""
    return encode(bench.loaded.tokenizer, edit.prompt, edit.target)


@torch.no_grad()
def whole(bench: Bench, tokens: Sequence[int], rival: Method | None = None, first: int | None = None) -> Tensor:
    """Logits (T, V) of one sequence through the whole model."""
    with nullcontext() if rival is None else rival.applied(first):
        logits: Tensor = bench.loaded.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def require_untouched_outside(bench: Bench, rival: Method, before: dict[str, Tensor], said_before: Tensor) -> None:
    """The model has the same modules, weights and answers, to the bit, after having been applied."""
    tokens = random_rows((7, 1), seed=5)[0].prompt
    with rival.applied():
        pass
    after = bench.loaded.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(whole(bench, tokens), said_before)
    assert not any(parameter.requires_grad for parameter in bench.loaded.model.parameters())


def snapshot(bench: Bench) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and answers now."""
    state = {name: value.clone() for name, value in bench.loaded.model.state_dict().items()}
    return state, whole(bench, random_rows((7, 1), seed=5)[0].prompt)


def require_batches_like_rows(bench: Bench, rival: Method, rows: Sequence[Row]) -> None:
    """Rows of several lengths in one batch are answered as each alone; alone, as by the whole model."""
    together = target_predictions(bench.loaded, rows, rival, batch_size=len(rows))
    for row, one in zip(rows, together, strict=True):
        logits = whole(bench, (*row.prompt, *row.target[:-1]), rival, len(row.prompt) - 1)[len(row.prompt) - 1 :]
        torch.testing.assert_close(
            one.losses, torch.nn.functional.cross_entropy(logits, torch.tensor(row.target), reduction="none"),
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip
        assert torch.equal(one.best, logits.argmax(-1))


@torch.no_grad()
def require_cache_changes_nothing(bench: Bench, rival: Method, prompts: Sequence[Sequence[int]], count: int) -> None:
    """What ``generate()`` adds, with its cache, is what the whole text through the whole model gives."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with rival.applied():
        found = bench.loaded.model.generate(
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )[:, width:]  # fmt: skip
    for prompt, answer in zip(prompts, found.tolist(), strict=True):
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(whole(bench, tokens, rival, len(prompt) - 1)[-1].argmax()))
        assert answer == tokens[len(prompt) :]


def require_batches_and_caches_change_nothing(bench: Bench, rival: Method) -> None:
    """Edits and other rows are answered in a batch as alone, and generated with a cache as without."""
    edited = [encoded(bench, edit) for edit in EDITS]
    require_batches_like_rows(bench, rival, [*edited, *random_rows((9, 2), (1, 2), (4, 3), seed=5)])
    require_cache_changes_nothing(bench, rival, [*[row.prompt for row in edited], (5, 6, 7), (9,)], 4)
