from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.helpers import site_of, tiny_qwen2_tokenizer
from support.tiny_models import tiny_model
from torch import Tensor, nn

from wisecli.artifacts.shard import ENDING, RESTING, Evidence, random_mask
from wisecli.config import EditSettings, MergeSettings
from wisecli.editing.closed_form import answered, fit_residuals
from wisecli.editing.evidence import gather_evidence
from wisecli.editing.hard_negatives import HardNegatives
from wisecli.editing.prompt_variants import AnswerKey
from wisecli.editing.resting import Behind, _questions, spaces_first, stretch, usual_length, with_rests
from wisecli.editing.task import Task
from wisecli.editing.training_examples import TrainingExamples, capture_examples, encode_edits
from wisecli.edits.record import Edit
from wisecli.models.loading import Loaded
from wisecli.models.tokenization import Row
from wisecli.routing.whitening import leading, whitening

EDITS = [Edit("year", "when ba be", "abc"), Edit("word", "ka ke ki", "doe")]
SETTINGS = EditSettings(residual_steps=150, residual_rate=0.3, residual_stop=0.3, batch_size=8)
LAYER = 2


class Bench:
    """A tiny model whose attention rests on spaces, and what two edits are trained with."""

    def __init__(self) -> None:
        model = tiny_model("qwen2")
        model.generation_config.eos_token_id = 1
        model.get_output_embeddings().get_parameter("weight").data.mul_(4)
        self.loaded = Loaded(model.requires_grad_(False), tiny_qwen2_tokenizer())
        self.site = site_of(model, LAYER)
        self.space = self.loaded.tokenizer(" ")["input_ids"][0]
        model.get_input_embeddings().get_parameter("weight").data[self.space] *= 40

    def examples(self) -> list[TrainingExamples]:
        numbered = list(enumerate(EDITS))
        return capture_examples(self.loaded, self.site, numbered, [(0, ""), (1, "pa. ")], batch_size=8, train_end=True)

    def task(self, usual: float) -> Task:
        mask = random_mask(self.site, 0.5, "columns", torch.Generator().manual_seed(1))
        unrelated = torch.randn(30, self.site.d_ff, generator=torch.Generator().manual_seed(2))
        return Task(self.loaded.model, self.site, mask, unrelated, 1.0, SETTINGS, usual=usual)

    @torch.no_grad()
    def length(self, tokens: list[int]) -> Tensor:
        """The length of the last token's state behind the edited layer, in the whole model."""
        whole = self.loaded.model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        return whole.hidden_states[LAYER + 1][0, -1].norm()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_a_long_state_is_stretched_by_its_length_and_others_are_not(bench: Bench) -> None:
    (examples,) = bench.examples()
    part = examples.activations
    usual = usual_length([examples])
    found = stretch(part, usual)
    longer = 0
    for row, (ids, mask) in enumerate(zip(part.batch.ids, part.batch.mask, strict=True)):
        for column in range(part.batch.start, part.batch.ids.shape[1]):
            if mask[column]:
                times = float(bench.length(ids[: column + 1][mask[: column + 1].bool()].tolist())) / usual
                assert float(found[row, column - part.first]) == pytest.approx(times if times > 1.5 else 1, rel=1e-4)
                longer += times > 1.5
    assert longer == 4, "the space of two edits in two contexts"
    assert (stretch(part, math.inf) == 1).all()
    assert (stretch(replace(part, norm=nn.Identity()), usual) == 1).all()


def test_the_whole_model_says_the_target_where_the_stretched_residual_is_added(bench: Bench) -> None:
    examples = bench.examples()
    task = bench.task(usual_length(examples))
    residuals = fit_residuals(task, [examples], lambda _: None)
    assert set(answered(task, examples, residuals).values()) == {1.0}
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
    times = bench.length([*row.prompt, row.target[0]]) / task.usual
    torch.testing.assert_close(found[1], times * residuals[AnswerKey(0)][1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], residuals[AnswerKey(0)][0])


def evidence_of(
    bench: Bench, examples: list[TrainingExamples], task: Task, residuals: dict[AnswerKey, Tensor]
) -> Evidence:
    def find(_keys: Tensor, answers: list[AnswerKey], positions: Tensor) -> Tensor:
        return torch.stack([residuals[one][place] for one, place in zip(answers, positions.tolist(), strict=True)])

    white = whitening(leading(torch.eye(bench.site.d_ff)))
    return gather_evidence(examples, 9, find, HardNegatives({}, white), usual=task.usual)  # type: ignore[arg-type]


def with_evidence(
    bench: Bench, usual: float | None = None
) -> tuple[dict[AnswerKey, Tensor], Evidence, dict[int, Row], float]:
    """Residuals and evidence of two edits, their rows, and the length of a usual state."""
    examples = bench.examples()
    task = bench.task(usual_length(examples) if usual is None else usual)
    residuals = fit_residuals(task, [examples], lambda _: None)
    rows = dict(enumerate(encode_edits(bench.loaded, EDITS, "", train_end=True)))
    return residuals, evidence_of(bench, examples, task, residuals), rows, task.usual


def test_an_edit_whose_target_begins_with_a_space_gets_keys_of_rests(bench: Bench) -> None:
    residuals, before, rows, usual = with_evidence(bench)
    assert spaces_first(bench.loaded, rows) == {bench.space: [0, 1]}
    behind = Behind(bench.loaded, bench.site, 8)
    rests = behind.rests(bench.space, usual)
    assert len(rests.keys) == 6
    found = with_rests(behind, before, residuals, rows, usual)
    own = found.context == RESTING
    assert own.sum() == 2 * len(rests.keys)
    ends = found.context == ENDING
    assert found.rows(~own & ~ends).keys.shape == before.keys.shape
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
    for key, times in zip(rests.keys, rests.stretch, strict=True):
        place = int((torch.stack(kept) - key).norm(dim=-1).argmin())
        torch.testing.assert_close(kept[place], key, rtol=1e-3, atol=1e-4)
        assert float(times) == pytest.approx(list(seen.values())[place], rel=1e-3)
    for edit in (0, 1):
        mine = found.rows(own & (found.edit == edit))
        torch.testing.assert_close(mine.residuals, residuals[AnswerKey(edit)][1] * rests.stretch[:, None])


def test_the_space_that_a_target_begins_with_is_the_end_of_a_prompt_too(bench: Bench) -> None:
    residuals, before, rows, usual = with_evidence(bench)
    behind = Behind(bench.loaded, bench.site, 8)
    found = with_rests(behind, before, residuals, {0: rows[0]}, usual)
    ends = found.rows(found.context == ENDING)
    assert set(ends.edit.tolist()) == {0} and set(ends.position.tolist()) == {0}
    own = found.rows((found.edit == 0) & (found.position == 1))
    assert set(own.context.tolist()) == {0, RESTING}, "the other context's key is as good as the bare prompt's"
    torch.testing.assert_close(ends.keys, own.keys)
    torch.testing.assert_close(ends.residuals, own.residuals)
    unseen = replace(before, held_out=torch.ones_like(before.held_out))
    kept = with_rests(behind, unseen, residuals, {0: rows[0]}, usual)
    assert int((kept.context == ENDING).sum()) == int((kept.context == RESTING).sum()), "none of what was never trained"


def test_where_attention_never_rests_nothing_is_added(bench: Bench) -> None:
    residuals, before, rows, usual = with_evidence(bench, usual=1e6)
    behind = Behind(bench.loaded, bench.site, 8)
    assert len(behind.rests(bench.space, usual).keys) == 0
    found = with_rests(behind, before, residuals, rows, usual)
    assert len(found.keys) == len(before.keys) + int((before.position == 1).sum())
    assert spaces_first(bench.loaded, {0: replace(rows[0], target=rows[0].target[1:])}) == {}
