"""Benches on tiny models, and what holds for every method that rewrites matrices, whatever it writes into them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from support.helpers import WORDS, alone, hooked, save_tiny
from support.loading import CPU
from support.rivals import require_batches_like_rows, require_cache_changes_nothing
from wisecli.bench.methods.base import Bench, Method
from wisecli.bench.methods.evaluation import target_predictions
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


def gradients_of(model: PreTrainedModel, site: MatrixSite, tokens: Sequence[int], target: Sequence[int]) -> Tensor:
    """Gradients (T, d), by the value matrix' output at each token, of the loss of a target at the last tokens."""
    given: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        given.append(output.detach().requires_grad_())
        return given[0]

    with hooked(model, site, keep):
        logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -len(target) :]
    (gradients,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor(target), reduction="sum"), given)
    return gradients[0]


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


def losses(bench: Bench, method: Method | None = None) -> list[float]:
    """The mean loss of each edit's target."""
    return [
        float(found.losses.mean()) for found in target_predictions(bench.loaded, rows_of(bench), method, batch_size=4)
    ]


def check_holds_for_every_rewriting(bench: Bench, method: Method) -> None:
    check_leaves_no_trace(bench, method)
    require_batches_like_rows(bench, method, rows_of(bench))
    require_cache_changes_nothing(bench, method, [row.prompt for row in rows_of(bench)], 5)
    assert method.rewritten_prompt("as it is") == "as it is"
