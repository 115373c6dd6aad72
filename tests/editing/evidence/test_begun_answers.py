import pytest
import torch
from support.spaces import Bench, with_evidence
from support.thorough import few
from support.tiny_models import Chain

from wisecli.artifacts.shard import BEGUN_CONTEXT
from wisecli.editing.evidence.begun_answers import begun_answer_evidence
from wisecli.editing.evidence.extra_keys import FittedEdits
from wisecli.editing.evidence.token_probe import TokenProbe
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.prompts.chat_template import chat_prompt
from wisecli.models.running.generation import generate


def test_the_first_residual_is_added_behind_words_that_begin_an_answer_in_chat() -> None:
    bench = Bench()
    residuals, before, rows, usual = with_evidence(bench)
    edits = FittedEdits(TokenProbe(bench.loaded, bench.site, 8), residuals, {1: rows[1]}, usual)
    bench.loaded.tokenizer.chat_template = None
    assert not list(begun_answer_evidence(before, edits)), "a bare prompt ends behind such words"
    bench.loaded.tokenizer.chat_template = "{% for turn in messages %}User: {{ turn.content }}\n{% endfor %}Assistant:"
    (found,) = begun_answer_evidence(before, edits)
    assert set(found.edit.tolist()) == {1}
    assert set(found.context.tolist()) == {BEGUN_CONTEXT}
    assert not bool(found.from_own_prompts.any())
    torch.testing.assert_close(found.residuals, residuals[AnswerKey(1)][0].expand(len(found.keys), -1))


BEGINNINGS = ("It is", "Sure! The answer is", "I believe that the answer is")


@pytest.mark.parametrize("beginning", few(BEGINNINGS, BEGINNINGS[:1]))
def test_the_real_model_goes_on_with_an_answer_that_is_begun_in_chat(
    chain: Chain, edited_chain: EditedModel, beginning: str
) -> None:
    edited = edited_chain
    prompts = [chat_prompt(edited.tokenizer, str(edit["prompt"])) + beginning for edit in chain.edits]
    tokens = generate(edited.model, edited.tokenizer, prompts, max_new_tokens=16)
    said = edited.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    wrong = {
        str(edit["target"]): text
        for edit, text in zip(chain.edits, said, strict=True)
        if text.strip().lower() != str(edit["target"]).strip().lower()
    }
    assert len(wrong) <= 1, wrong
