import math
from dataclasses import replace

import pytest
import torch
from support.spaces import EDITS, Bench, evidence_of, with_evidence
from torch import Tensor, nn

from wisecli.artifacts.shard import SINK_CONTEXT, Evidence
from wisecli.config import MergeSettings
from wisecli.editing.evidence.attention_sinks import (
    attention_sink_evidence,
    edits_by_leading_space,
    median_state_norm,
    residual_scale,
    sink_keys,
)
from wisecli.editing.evidence.extra_keys import FittedEdits
from wisecli.editing.evidence.serving_strength import bare_prompt_accuracy
from wisecli.editing.evidence.token_probe import TokenProbe, _questions
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import encode_edits
from wisecli.editing.writers.closed_form import fit_residuals


def test_a_long_state_is_stretched_by_its_length_and_others_are_not(bench: Bench) -> None:
    (examples,) = bench.examples()
    part = examples.activations
    usual = median_state_norm([examples])
    found = residual_scale(part, usual)
    longer = 0
    for row, (ids, mask) in enumerate(zip(part.batch.ids, part.batch.mask, strict=True)):
        for column in range(part.batch.start, part.batch.ids.shape[1]):
            if mask[column]:
                times = float(bench.length(ids[: column + 1][mask[: column + 1].bool()].tolist())) / usual
                assert float(found[row, column - part.first]) == pytest.approx(times if times > 1.5 else 1, rel=1e-4)
                longer += times > 1.5
    assert longer == 4, "the space of two edits in two contexts"
    assert (residual_scale(part, math.inf) == 1).all()
    assert (residual_scale(replace(part, norm=nn.Identity()), usual) == 1).all()


def test_the_whole_model_says_the_target_where_the_stretched_residual_is_added(bench: Bench) -> None:
    examples = bench.examples()
    task = bench.task(median_state_norm(examples))
    residuals = fit_residuals(task, [examples], lambda _: None)
    assert set(bare_prompt_accuracy(task, examples, residuals).values()) == {1.0}
    evidence = evidence_of(bench, examples, task, residuals)
    row = encode_edits(bench.loaded, EDITS[:1], "", train_end=True)[0]
    own = (evidence.edit == 0) & (evidence.context == 0)
    found = evidence.residuals[own][evidence.position[own].argsort()]
    added = MergeSettings().strength * found

    def add(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        changed = output.clone()
        changed[0, len(row.prompt) - 1 :] += added
        return changed

    handle = bench.loaded.model.get_submodule(bench.site.module).register_forward_hook(add)
    with torch.no_grad():
        tokens = torch.tensor([[*row.prompt, *row.target[:-1]]])
        logits = bench.loaded.model(tokens, use_cache=False).logits[0, len(row.prompt) - 1 :]
    handle.remove()
    assert logits.argmax(-1).tolist() == list(row.target)
    times = bench.length([*row.prompt, row.target[0]]) / task.median_state_norm
    torch.testing.assert_close(found[1], times * residuals[AnswerKey(0)][1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], residuals[AnswerKey(0)][0])


def test_an_edit_whose_target_begins_with_a_space_gets_keys_of_rests(bench: Bench) -> None:
    residuals, before, rows, usual = with_evidence(bench)
    assert edits_by_leading_space(bench.loaded, rows) == {bench.space: [0, 1]}
    behind = TokenProbe(bench.loaded, bench.site, 8)
    rests = sink_keys(behind, bench.space, usual)
    assert len(rests.keys) == 6
    found = Evidence.joined([before, *attention_sink_evidence(before, FittedEdits(behind, residuals, rows, usual))])
    own = found.context == SINK_CONTEXT
    assert own.sum() == 2 * len(rests.keys)
    assert torch.equal(own, ~found.from_own_prompts)
    assert found.rows(~own).keys.shape == before.keys.shape
    assert set(found.position[own].tolist()) == {1}
    assert not bool(found.chat[own].any() or found.held_out[own].any())
    seen = dict[tuple[int, ...], float]()
    module = bench.loaded.model.get_submodule(bench.site.module)
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0][0, -1]))
    for question in _questions():
        tokens = [*bench.loaded.tokenizer(question)["input_ids"], bench.space]
        seen[tuple(tokens)] = float(bench.length(tokens)) / usual
    handle.remove()
    for key, times in zip(rests.keys, rests.residual_scale, strict=True):
        place = int((torch.stack(kept) - key).norm(dim=-1).argmin())
        torch.testing.assert_close(kept[place], key, rtol=1e-3, atol=1e-4)
        assert float(times) == pytest.approx(list(seen.values())[place], rel=1e-3)
    for edit in (0, 1):
        mine = found.rows(own & (found.edit == edit))
        torch.testing.assert_close(mine.residuals, residuals[AnswerKey(edit)][1] * rests.residual_scale[:, None])


def test_where_attention_never_rests_nothing_is_added(bench: Bench) -> None:
    residuals, before, rows, usual = with_evidence(bench, usual=1e6)
    behind = TokenProbe(bench.loaded, bench.site, 8)
    assert len(sink_keys(behind, bench.space, usual).keys) == 0
    found = Evidence.joined([before, *attention_sink_evidence(before, FittedEdits(behind, residuals, rows, usual))])
    assert len(found.keys) == len(before.keys)
    assert edits_by_leading_space(bench.loaded, {0: replace(rows[0], target=rows[0].target[1:])}) == {}
