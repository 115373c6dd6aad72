import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.helpers import alone, random_rows, save_tiny
from support.loading import CPU
from torch import Tensor

from wisecli.bench.methods.base import PromptEnd, changed
from wisecli.bench.methods.evaluation import BaseModelAnswers, MethodSubject, target_predictions
from wisecli.edits.record import Edit
from wisecli.models.loading import Loaded, load_model
from wisecli.models.running.hooks import hooked

PROMPTS = ["ba be bi", "ka ke ki ko", "ma", "ta te ti to tu la le li"]


class Shifted:
    """A method that needs no learning: adds a vector at one layer, from the prompt's last token on or everywhere."""

    def __init__(self, loaded: Loaded, *, held: bool) -> None:
        self.model, self.layer = loaded.model, loaded.model.get_submodule("model.layers.2")
        generator = torch.Generator().manual_seed(1)
        self.shift = 3 * torch.randn(loaded.model.config.hidden_size, generator=generator)
        self.hold = held

    def edit(self, edits: Sequence[Edit]) -> None:
        """Nothing is learnt."""

    @contextmanager
    def applied(self, first: int | None = None) -> Iterator[None]:
        admission = PromptEnd(first)

        def hook(_module: object, _inputs: object, output: Tensor) -> Tensor:
            if not self.hold:
                return output + self.shift
            # Only some rows get anything, by their state at the prompt's last token.
            held, start = admission.held_decision(output, lambda ends: (ends[:, 0] > ends[:, 1]).float())
            output = output.clone()
            output[:, start:] += held[:, None, None] * self.shift
            return output

        with hooked(admission.follow_passes(self.model), self.layer.register_forward_hook(hook)):
            yield

    def rewritten_prompt(self, prompt: str) -> str:
        return prompt

    def bytes(self) -> int:
        return 0


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return load_model(save_tiny(tmp_path / "model"), load=CPU)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_what_is_said_is_what_each_row_says_alone(loaded: Loaded, batch_size: int) -> None:
    rows = random_rows((3, 2), (7, 1), (5, 4), (2, 3))
    for row, found in zip(rows, target_predictions(loaded, rows, batch_size=batch_size), strict=True):
        logits = alone(loaded.model, row)
        assert found.best.tolist() == logits.argmax(-1).tolist()
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(row.target), reduction="none")
        assert torch.allclose(found.losses, expected, atol=1e-4)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_method_is_measured_as_its_whole_model_answers(loaded: Loaded, batch_size: int, *, held: bool) -> None:
    method = Shifted(loaded, held=held)
    rows = random_rows((3, 2), (7, 1), (5, 4), (2, 3), (6, 2), (4, 4))
    found = target_predictions(loaded, rows, method, batch_size=batch_size)
    moved = 0
    for row, one in zip(rows, found, strict=True):
        with method.applied(len(row.prompt) - 1):
            logits = alone(loaded.model, row)
        assert one.best.tolist() == logits.argmax(-1).tolist()
        moved += not torch.equal(logits, alone(loaded.model, row))
    assert moved == len(rows) if not held else 0 < moved < len(rows)


@pytest.mark.parametrize("held", [False, True])
def test_answers_with_a_cache_are_those_without(loaded: Loaded, *, held: bool) -> None:
    method, stops = Shifted(loaded, held=held), frozenset(range(0, loaded.model.config.vocab_size, 6))
    prompts = [" ".join(PROMPTS[:count]) for count in (1, 2, 3, 4)] + PROMPTS[1:]
    found = (
        MethodSubject(loaded, method, BaseModelAnswers(), batch_size=8)
        .answering(8, stops)
        .after(prompts, stage="after")
    )
    lengths, end = set(), loaded.model.generation_config.eos_token_id
    for prompt, answer in zip(prompts, found, strict=True):
        ids = loaded.tokenizer(prompt)["input_ids"]
        tokens = list(ids)
        while len(tokens) < len(ids) + 8 and (len(tokens) == len(ids) or tokens[-1] not in stops):
            with method.applied(len(ids) - 1), torch.no_grad():
                token = int(loaded.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
            if token == end:
                break
            tokens.append(token)
        lengths.add(len(tokens) - len(ids))
        assert answer.text == loaded.tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True).strip()
    assert len(lengths) > 2  # so that rows were taken out while others were held


def test_the_unedited_model_is_asked_once_for_all_methods(loaded: Loaded) -> None:
    known, pairs = BaseModelAnswers(), [("ba be", "bi bo"), ("ka", "ke"), ("ba be", "bi bo")]
    counts = []
    for held in (False, True):
        calls: list[int] = []
        handle = loaded.model.model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        subject = MethodSubject(loaded, Shifted(loaded, held=held), known, batch_size=32)
        measured = subject.teacher_forced(pairs, stage="reliability")
        handle.remove()
        counts.append(len(calls))
        assert measured[0] == measured[2]
        (before,) = target_predictions(loaded, [subject.row(*pairs[0])], batch_size=1)
        assert measured[0].before.loss == pytest.approx(float(before.losses.mean()), abs=1e-5)
        assert measured[0].before.right == float(
            (before.best == torch.tensor(subject.row(*pairs[0]).target)).float().mean()
        )
        share = float((before.losses < -math.log(0.8)).float().mean())
        assert measured[0].before.known == share
    assert counts == [2, 1]
    json.dumps(measured[0].same)


def test_changed_parameters_come_back_to_the_bit(loaded: Loaded) -> None:
    weight = loaded.model.get_parameter("model.layers.2.mlp.down_proj.weight")
    before = weight.data.clone()
    with pytest.raises(ValueError, match="within"), changed([weight], [torch.zeros_like(weight)]):
        assert not weight.any()
        raise ValueError("within")
    assert torch.equal(weight, before)
