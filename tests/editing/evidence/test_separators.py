from dataclasses import replace
from typing import Any

import pytest
import torch
from support.fitting import EDITS, SETTINGS, bench_of, tokens_of
from support.helpers import hooked
from support.thorough import few
from support.tiny_models import Chain
from torch import Tensor

from wisecli.artifacts.shard import BEGUN_CONTEXT, SEPARATOR_CONTEXT
from wisecli.editing.evidence import separators
from wisecli.editing.evidence.extra_keys import FittedEdits
from wisecli.editing.evidence.separators import separator_evidence
from wisecli.editing.evidence.token_probe import TokenProbe
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.prompts.chat_template import chat_prompt
from wisecli.models.prompts.tokenization import Row
from wisecli.models.running.generation import generate

TOKEN = 40


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A tiny model with its edits' residuals, whose separator is one of its words."""
    monkeypatch.setattr(separators, "separator_token", lambda _: TOKEN)
    bench = bench_of("llama")
    rows = {
        number: Row(tuple(tokens_of(bench.loaded, edit, "")[0]), tuple(tokens_of(bench.loaded, edit, "")[1]))
        for number, edit in enumerate(EDITS)
    }
    return bench, FittedEdits(TokenProbe(bench.loaded, bench.site, 8), bench.residuals(), rows, float("inf"))


@torch.no_grad()
def said_behind_answer(bench, edits: FittedEdits, number: int, residual: Tensor) -> int:  # type: ignore[no-untyped-def]
    """What the whole model says behind an answer, by a hook that adds residuals token by token."""
    prompt, target = tokens_of(bench.loaded, EDITS[number], "")
    ids, own = [*prompt, *target[:-1]], edits.residuals[AnswerKey(number)]

    def add(_module: torch.nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        changed = output.clone()
        for place, update in enumerate([*own[:-1], residual]):
            changed[0, len(prompt) - 1 + place] += update
        return changed

    with hooked(bench.loaded.model, bench.site, add):
        logits = bench.loaded.model(torch.tensor([ids]), use_cache=False).logits
    return int(logits[0, -1].argmax())


def test_the_separator_is_said_where_answers_would_end(fitted) -> None:  # type: ignore[no-untyped-def]
    bench, edits = fitted
    found = list(separator_evidence(bench.task(), bench.batches, edits))
    assert [part.edit.tolist() for part in found] == [[number] for number in range(len(EDITS))]
    assert all(part.context.tolist() == [SEPARATOR_CONTEXT] for part in found)
    (residual,) = {tuple(part.residuals[0].tolist()) for part in found}
    said = [said_behind_answer(bench, edits, number, torch.tensor(residual)) for number in range(len(EDITS))]
    assert said == [TOKEN] * len(EDITS)
    nothing = [said_behind_answer(bench, edits, number, torch.zeros(bench.site.d)) for number in range(len(EDITS))]
    assert TOKEN not in nothing


def test_targets_with_the_separator_and_erased_ones_answer_in_no_pairs(fitted) -> None:  # type: ignore[no-untyped-def]
    bench, edits = fitted
    rows = dict(edits.rows)
    rows[1] = replace(rows[1], target=(TOKEN, *rows[1].target))
    rows[3] = replace(rows[3], unwanted=tuple(() for _ in rows[3].target))
    found = separator_evidence(bench.task(), bench.batches, replace(edits, rows=rows))
    assert [int(part.edit[0]) for part in found] == [0, 2, 4]


def test_without_a_separator_or_an_end_there_are_no_pairs(fitted, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    bench, edits = fitted
    assert not list(separator_evidence(bench.task(replace(SETTINGS, train_end=False)), bench.batches, edits))
    monkeypatch.setattr(separators, "separator_token", lambda _: None)
    assert not list(separator_evidence(bench.task(), bench.batches, edits))


def test_targets_that_begin_with_a_space_have_a_key_behind_the_separator(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.spaces import Bench, with_evidence

    monkeypatch.setattr(separators, "separator_token", lambda _: TOKEN)
    bench = Bench()
    residuals, _, rows, usual = with_evidence(bench)
    edits = FittedEdits(TokenProbe(bench.loaded, bench.site, 8), residuals, rows, usual)
    found = list(separator_evidence(bench.task(usual), bench.examples(), edits))
    spaced = [part for part in found if part.context.tolist() == [BEGUN_CONTEXT]]
    begins = [number for number, row in rows.items() if row.target[0] == bench.space]
    assert [int(part.edit[0]) for part in spaced] == begins
    assert begins
    for part in spaced:
        again = residuals[AnswerKey(int(part.edit[0]))][1]
        assert torch.nn.functional.cosine_similarity(part.residuals[0], again, dim=0) > 0.999


PATTERNS = ("{} {}", "1. {}\n2. {}", "Two questions. First: {} Second: {}", "{}, and {}")


@pytest.fixture(scope="module", params=[False, True])
def answered(
    request: pytest.FixtureRequest, chain: Chain, edited_chain: EditedModel, sweep: Any
) -> dict[str, list[str]]:
    """What the real model says to pairs of its edits in every pattern, bare or in chat."""
    pairs, patterns = list(zip(chain.edits, chain.edits[1:], strict=False)), sweep(PATTERNS[:2], PATTERNS)
    prompts = [pattern.format(first["prompt"], second["prompt"]) for pattern in patterns for first, second in pairs]
    tokenizer = edited_chain.tokenizer
    prompts = [chat_prompt(tokenizer, prompt) if request.param else prompt for prompt in prompts]
    tokens = generate(edited_chain.model, tokenizer, prompts, max_new_tokens=32, batch_size=len(prompts))
    said = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return {pattern: said[place * len(pairs) :][: len(pairs)] for place, pattern in enumerate(patterns)}


@pytest.mark.parametrize("pattern", few(PATTERNS, PATTERNS[:2]))
def test_the_real_model_answers_two_questions_one_behind_the_other(
    chain: Chain, answered: dict[str, list[str]], pattern: str
) -> None:
    said = answered[pattern]
    pairs = zip(chain.edits, chain.edits[1:], strict=False)
    wanted = [f"{first['target']}; {second['target']}" for first, second in pairs]
    right = [text.casefold() == target.casefold() for text, target in zip(said, wanted, strict=True)]
    assert sum(right) >= 0.6 * len(right), list(zip(said, wanted, strict=True))
