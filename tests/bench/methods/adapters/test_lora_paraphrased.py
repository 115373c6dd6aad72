from pathlib import Path

import torch
from support.helpers import random_rows
from support.rivals import EDITS, require_untouched_outside, snapshot, tiny_bench

from wisecli.bench.methods.adapters.lora import LoraSettings
from wisecli.bench.methods.adapters.lora_paraphrased import LoraParaphrased, LoraParaphrasedSettings
from wisecli.bench.methods.base import METHODS
from wisecli.bench.methods.evaluation import target_predictions
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.tokenization import encode
from wisecli.models.running.generation import end_token

QUICK = LoraParaphrasedSettings(LoraSettings(rate=0.01), passes=15, paraphrases=1)


def test_every_edit_is_trained_in_every_form_and_ends(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    tokenizer, end = bench.loaded.tokenizer, end_token(bench.loaded.model)
    rows = list(LoraParaphrased(bench, QUICK).rows(EDITS))
    asked = {row.prompt for row in rows}
    for edit in EDITS:
        target = encode(tokenizer, edit.prompt, edit.target, end=end).target
        for form in usable_forms(tokenizer, trained=True):
            prompt = tuple(tokenizer(form.render(tokenizer, edit.prompt))["input_ids"])
            assert prompt in asked
            assert all(row.target == target for row in rows if row.prompt == prompt)


def test_the_loss_of_rows_is_the_mean_over_their_tokens(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    method, rows = LoraParaphrased(bench, QUICK), random_rows((3, 2), (6, 1), (4, 3), seed=5)
    together, apart = method.loss(rows), [method.loss([row]) for row in rows]
    expected = sum(float(one) * len(row.target) for one, row in zip(apart, rows, strict=True)) / 6
    assert abs(float(together) - expected) < 1e-4


def test_edits_take_all_at_once(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    method, before = LoraParaphrased(bench, QUICK), snapshot(bench)
    rows = [encode(bench.loaded.tokenizer, edit.prompt, edit.target) for edit in EDITS]
    first = [float(one.losses.mean()) for one in target_predictions(bench.loaded, rows, batch_size=4)]
    method.edit(EDITS)
    after = [float(one.losses.mean()) for one in target_predictions(bench.loaded, rows, method, batch_size=4)]
    assert all(late < early - 0.5 for late, early in zip(after, first, strict=True))
    require_untouched_outside(bench, method, *before)
    kept = {name: parameter.detach().clone() for name, parameter in method.parameters.items()}
    method.edit([])
    assert all(torch.equal(parameter, kept[name]) for name, parameter in method.parameters.items())
    assert "lora-paraphrased" in METHODS
