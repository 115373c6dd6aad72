"""Benches on tiny models, and what holds for every method that rewrites matrices, whatever it writes into them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from support.helpers import WORDS, alone, save_tiny
from support.loading import CPU
from wisecli.bench.methods.base import Bench, Method
from wisecli.bench.methods.evaluation import BaseModelAnswers, MethodSubject, target_predictions
from wisecli.edits.record import Edit
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import known_layout
from wisecli.models.layout.site import MatrixSite
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import Row, encode


def words(*lengths: int, seed: int = 7) -> list[str]:
    """Texts of random words, of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(len(WORDS), (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(WORDS[place] for place in draw) for draw in draws]


PROMPTS = words(3, 9, 5, 6, seed=1)
TARGETS = words(2, 1, 3, 2, seed=2)
EDITS = [
    Edit(str(number), prompt, target, subject=" ".join(prompt.split()[1:3]))
    for number, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True))
]


def bench_for(directory: Path, architecture: str, texts: Sequence[str] | None = None) -> Bench:
    """A bench on a tiny model with a few unrelated texts."""
    save_tiny(directory, architecture)
    loaded = load_model(directory, load=CPU)
    given = words(*range(2, 26)) if texts is None else texts
    return Bench(loaded, Checkpoint(directory), known_layout(directory), (), given, batch_size=5, seed=3)


def weight_of(model: PreTrainedModel, site: MatrixSite) -> Tensor:
    """The value matrix in a model as it is now (d, d_ff)."""
    weight = site.watched(model).get_parameter("weight")
    return weight.T if site.transposed else weight


def rows_of(bench: Bench) -> list[Row]:
    return [encode(bench.loaded.tokenizer, edit.prompt, edit.target) for edit in EDITS]


def check_leaves_no_trace(bench: Bench, method: Method) -> None:
    """Within, the model differs; outside it is what it was, to the bit, even where something goes wrong within."""
    model, row = bench.loaded.model, rows_of(bench)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = alone(model, row)
    with method.applied():
        assert (alone(model, row) - logits).abs().max() > 1e-4
    try:
        with method.applied(3):
            raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(alone(model, row), logits)


def check_rows_do_not_depend_on_their_batch(bench: Bench, method: Method) -> None:
    rows = rows_of(bench)
    together = target_predictions(bench.loaded, rows, method, batch_size=len(rows))
    for row, found in zip(rows, together, strict=True):
        with method.applied():
            logits = alone(bench.loaded.model, row)
        expected = -logits.log_softmax(-1)[range(len(row.target)), list(row.target)]
        torch.testing.assert_close(found.losses, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(found.best, logits.argmax(-1))


def check_generation_with_a_cache(bench: Bench, method: Method) -> None:
    """As text computed anew for every token, one prompt at a time."""
    loaded, count = bench.loaded, 5
    subject = MethodSubject(loaded, method, BaseModelAnswers(), batch_size=len(PROMPTS))
    _, found = subject.answers(PROMPTS, max_new_tokens=count)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        tokens = list(loaded.tokenizer(prompt)["input_ids"])
        start = len(tokens)
        with torch.no_grad(), method.applied():
            while len(tokens) < start + count:
                token = int(loaded.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
                if token == loaded.model.generation_config.eos_token_id:
                    break
                tokens.append(token)
        assert answer == loaded.tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()


def check_holds_for_every_rewriting(bench: Bench, method: Method) -> None:
    check_leaves_no_trace(bench, method)
    check_rows_do_not_depend_on_their_batch(bench, method)
    check_generation_with_a_cache(bench, method)
    assert method.rewritten_prompt("as it is") == "as it is"
