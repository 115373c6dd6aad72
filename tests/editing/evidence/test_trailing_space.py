from dataclasses import replace

import pytest
import torch
from support.spaces import Bench, with_evidence
from support.thorough import few
from support.tiny_models import Chain
from torch import Tensor

from wisecli.artifacts.shard import SINK_CONTEXT, SPACE_CONTEXT, Evidence
from wisecli.editing.evidence.extra_keys import FittedEdits
from wisecli.editing.evidence.shard_evidence import with_extra_keys
from wisecli.editing.evidence.token_probe import TokenProbe, _questions
from wisecli.editing.evidence.trailing_space import trailing_space_evidence
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.prompts.tokenization import Row
from wisecli.models.running.generation import generate


@pytest.fixture(scope="module")
def behind(bench: Bench) -> TokenProbe:
    return TokenProbe(bench.loaded, bench.site, 8)


def ends_of(evidence: Evidence) -> Evidence:
    found = evidence.rows(evidence.context == SPACE_CONTEXT)
    assert set(found.position.tolist()) <= {0}
    assert not bool(found.held_out.any() or found.chat.any())
    return found


def test_the_space_that_a_target_begins_with_is_the_end_of_a_prompt_too(bench: Bench, behind: TokenProbe) -> None:
    residuals, before, rows, usual = with_evidence(bench)
    edits = FittedEdits(behind, residuals, {0: rows[0]}, usual)
    found = with_extra_keys(before, edits)
    ends, own = ends_of(found), found.rows((found.edit == 0) & (found.position == 1))
    assert set(own.context.tolist()) == {0, SINK_CONTEXT}, "the other context's key is as good as the bare prompt's"
    assert set(ends.edit.tolist()) == {0}
    torch.testing.assert_close(ends.keys, own.keys)
    torch.testing.assert_close(ends.residuals, own.residuals)
    unseen = replace(before, held_out=torch.ones_like(before.held_out))
    assert [len(one.keys) for one in trailing_space_evidence(unseen, edits)] == [0], "none of what was not trained"


def test_a_word_is_begun_behind_a_blank_with_a_multiple_of_its_residual(bench: Bench, behind: TokenProbe) -> None:
    residuals, before, rows, usual = with_evidence(bench)
    word = replace(rows[1], target=rows[1].target[1:])
    ends = ends_of(with_extra_keys(before, FittedEdits(behind, residuals, {1: word}, usual)))
    assert set(ends.edit.tolist()) == {1}
    means, times = [], []
    for form in ("{}", "Q: {}\nA:", "{}\nAnswer:"):
        asked = [form.replace("{}", text) for text in _questions()]
        there = torch.stack([key_of(bench, text) for text in asked])
        there = there / there.norm(dim=-1, keepdim=True)
        tokens = [[*bench.loaded.tokenizer(text)["input_ids"], bench.space] for text in asked]
        longer = torch.stack([bench.length(each) for each in tokens]) / usual
        longer = longer.where(longer > 1.5, 1.0)
        for some in (longer == 1, longer > 1):
            if some.any():
                means.append(there[some].mean(0))
                times.append(longer[some].mean())
    assert max(times) > 1.5, "attention rests on it behind some questions"
    torch.testing.assert_close(ends.keys, torch.stack(means), rtol=1e-3, atol=1e-4)
    wanted = 3 * torch.stack(times)[:, None] * residuals[AnswerKey(1)][0]
    torch.testing.assert_close(ends.residuals, wanted, rtol=1e-3, atol=1e-3)


def test_what_is_erased_and_tokenizers_without_a_token_for_a_blank_get_no_keys(
    bench: Bench, behind: TokenProbe
) -> None:
    residuals, before, rows, usual = with_evidence(bench)
    word: Row = replace(rows[1], target=rows[1].target[1:])
    erased = replace(word, unwanted=(word.target[0],))
    found = with_extra_keys(before, FittedEdits(behind, residuals, {1: erased}, usual))
    assert len(found.keys) == len(before.keys)

    def stripped(text: str) -> object:
        return bench.loaded.tokenizer(text.rstrip())

    parts = {"__call__": staticmethod(stripped), "decode": bench.loaded.tokenizer.decode, "chat_template": None}
    tokenizer = type("Stripping", (), parts)()
    without = TokenProbe(replace(bench.loaded, tokenizer=tokenizer), bench.site, 8)
    found = with_extra_keys(before, FittedEdits(without, residuals, {1: word}, usual))
    assert len(found.keys) == len(before.keys)


def key_of(bench: Bench, text: str) -> Tensor:
    """The edited matrix's input at a blank behind a text, in the whole model."""
    kept: list[Tensor] = []
    module = bench.loaded.model.get_submodule(bench.site.module)
    handle = module.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0][0, -1]))
    with torch.no_grad():
        bench.loaded.model(torch.tensor([[*bench.loaded.tokenizer(text)["input_ids"], bench.space]]), use_cache=False)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("form", few(["{} ", "Q: {}\nA: "], ["Q: {}\nA: "]))
def test_the_real_model_answers_behind_a_blank(chain: Chain, edited_chain: EditedModel, form: str) -> None:
    edited = edited_chain
    prompts = [form.replace("{}", str(edit["prompt"])) for edit in chain.edits]
    said = edited.tokenizer.batch_decode(generate(edited.model, edited.tokenizer, prompts, max_new_tokens=16))
    wrong = {
        str(edit["target"]): text
        for edit, text in zip(chain.edits, said, strict=True)
        if text.strip() != str(edit["target"]).strip()
    }
    assert not wrong
