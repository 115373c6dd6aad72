import sys
from pathlib import Path

import pytest
import torch
from support.helpers import random_rows, row_of
from support.rivals import (
    EDITS,
    require_batches_and_caches_change_nothing,
    require_untouched_outside,
    snapshot,
    tiny_bench,
    whole,
)
from support.tiny_models import TINY_CONFIGS, tiny_model
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from wisecli.bench.methods.adapters.lora import Lora, LoraSettings, projections
from wisecli.bench.methods.base import METHODS, UnsuitableError
from wisecli.bench.methods.evaluation import target_predictions
from wisecli.models.prompts.tokenization import Row, encode

BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])
QUICK = LoraSettings(rate=0.005)
# Adam takes the sign of gradients that are all but zero: over many steps no two ways of computing them agree.
FEW = LoraSettings(rate=0.005, steps=4)


def matrices(lora: Lora) -> dict[str, Tensor]:
    """Copies of all A (r, in) and B (out, r), by the module that they stand beside."""
    names = {id(module): name for name, module in lora.bench.loaded.model.named_modules()}
    found = {}
    for place, (*_, base, _) in enumerate(lora._swaps):
        for letter in "AB":
            parameter = lora.parameters[f"{place}.lora_{letter}.default.weight"]
            found[f"{names[id(base)]}.{letter}"] = parameter.detach().clone()
    return found


def merged_logits(lora: Lora, low_rank: dict[str, Tensor], row: Row) -> Tensor:
    """Logits (n, V) that predict a row's target where W + α/r · B A stands for every W."""
    model = lora.bench.loaded.model
    scale, weights = lora.settings.alpha / lora.settings.rank, {}
    for name in {name.rpartition(".")[0] for name in low_rank}:
        change = scale * low_rank[f"{name}.B"] @ low_rank[f"{name}.A"]
        weight = model.get_submodule(name).get_parameter("weight")
        weights[f"{name}.weight"] = weight + (change.T if lora.bench.layout.transposed else change)
    ids = torch.tensor([[*row.prompt, *row.target[:-1]]])
    return functional_call(model, weights, (ids,), {"use_cache": False}).logits[0, len(row.prompt) - 1 :]


@BOTH
def test_training_is_adam_on_the_low_rank_change(tmp_path: Path, architecture: str) -> None:
    bench = tiny_bench(tmp_path / "model", architecture)
    bench.loaded.model.double()
    lora = Lora(bench, FEW)
    own = {name: value.requires_grad_() for name, value in matrices(lora).items()}
    assert all(bool((value == 0).all()) == name.endswith("B") for name, value in own.items())
    lora.edit(EDITS[:1])
    lora.edit(EDITS[1:2])
    for edit in EDITS[:2]:
        row = encode(lora.bench.loaded.tokenizer, edit.prompt, edit.target)
        optimizer = torch.optim.Adam(list(own.values()), lr=FEW.rate)
        for _ in range(FEW.steps):
            loss = F.cross_entropy(merged_logits(lora, own, row), torch.tensor(row.target))
            if loss.item() < FEW.stop:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in matrices(lora).items():
        torch.testing.assert_close(value, own[name].detach(), atol=1e-4, rtol=1e-3)
    for row in random_rows((5, 3), (7, 1), seed=5):
        told = whole(lora.bench, (*row.prompt, *row.target[:-1]), lora)[len(row.prompt) - 1 :]
        torch.testing.assert_close(told, merged_logits(lora, matrices(lora), row), atol=1e-3, rtol=1e-3)


@BOTH
def test_the_latest_edit_holds_and_outside_nothing_is_changed(tmp_path: Path, architecture: str) -> None:
    bench = tiny_bench(tmp_path / "model", architecture)
    before, attributes = snapshot(bench), set(vars(bench.loaded.model))
    lora = Lora(bench, QUICK)
    lora.edit(EDITS)
    rows = [encode(bench.loaded.tokenizer, edit.prompt, edit.target) for edit in EDITS]
    assert target_predictions(bench.loaded, rows, lora, batch_size=2)[-1].best.tolist() == list(rows[-1].target)
    require_untouched_outside(bench, lora, *before)
    assert set(vars(bench.loaded.model)) == attributes
    assert lora.bytes() == sum(4 * value.numel() for value in matrices(lora).values())
    require_batches_and_caches_change_nothing(bench, lora)


def test_the_same_seed_gives_the_same_adapters_and_leaves_chance_alone(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    torch.manual_seed(1)
    first = torch.rand(1)
    torch.manual_seed(1)
    one, other = METHODS["lora"](bench), METHODS["lora"](bench)
    assert torch.equal(torch.rand(1), first)
    assert isinstance(one, Lora)
    assert isinstance(other, Lora)
    assert all(torch.equal(value, matrices(other)[name]) for name, value in matrices(one).items())


@pytest.mark.parametrize("architecture", sorted(TINY_CONFIGS))
def test_every_architecture_has_its_attention_and_value_matrix_adapted(architecture: str) -> None:
    model = tiny_model(architecture)
    row = row_of(model.config)
    found = projections(model, row["layers"], row["value"])
    assert sum(name.endswith(row["value"]) for name in found) == model.config.get_text_config().num_hidden_layers
    attention = {name.split(".", 3)[-1] for name in found if not name.endswith(row["value"])}
    assert attention
    assert all("attn" in name or "attention" in name for name in attention)


def test_without_peft_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny_bench(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnsuitableError, match="pip install peft"):
        Lora(bench)
