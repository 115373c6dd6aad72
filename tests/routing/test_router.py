"""One rule decides for all who ask what answers, and a second question on a used cache is decided by itself."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.wise import change, residual
from support.evaluation import edited_model
from support.helpers import WORDS, choice_of, hooked
from support.loading import CPU
from torch import Tensor, nn
from transformers import DynamicCache

from wisecli.commands.checkpoint.explain import explain
from wisecli.commands.checkpoint.generate import generate
from wisecli.edits.record import Edit
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.evaluation.teacher_forcing import _routes
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.activations import capture
from wisecli.models.running.forward_pass import CACHE_ARGUMENT
from wisecli.models.running.generation import left_padded
from wisecli.routing.deciding.decision import WindowStates
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.layers.routed_layer import RoutedMatrix, memory_module
from wisecli.routing.memories.side_memory import SideMemory
from wisecli.routing.passes.token_cache import cache_returned, last_memory

EDITS = [Edit(f"edit {number}", word, "be") for number, word in enumerate(WORDS[:6])]
KINDS: dict[str, dict[str, Any]] = {
    "lookup": {"kind": "lookup", "memories": 3},
    "merged": {},
    "facts in matrices": {"kind": "facts", "memories": 3},
    "several matrices": {"memories": 3},
    "by mean": {"memories": 3, "pooling": "mean"},
}
PROMPTS = [" ".join(WORDS[first : first + length]) for first, length in ((0, 5), (9, 3), (20, 8), (33, 1), (40, 6))]


@pytest.fixture(params=KINDS)
def edited(request: pytest.FixtureRequest, tmp_path: Path) -> EditedModel:
    return edited_model(tmp_path, edits=EDITS, **KINDS[request.param])


class Decisions:
    """What the routed layer added, for each call of it."""

    def __init__(self, routed: RoutedMatrix, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chosen: list[Tensor] = []
        kind = type(routed)
        add = kind.add

        def noting(own: RoutedMatrix, answer: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
            self.chosen.append(chosen)
            return add(own, answer, keys, chosen)

        monkeypatch.setattr(kind, "add", noting)


@torch.no_grad()
def by_the_layer(edited: EditedModel, row: Row, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What answered each token of a prompt and of the answer after it, one token at a time."""
    with monkeypatch.context() as patched:
        noted, cache = Decisions(edited.routed, patched), DynamicCache(config=edited.model.config)
        edited.model(torch.tensor([row.prompt]), **{CACHE_ARGUMENT: cache})
        for token in row.target[:-1]:
            edited.model(torch.tensor([[token]]), **{CACHE_ARGUMENT: cache})
    return edited.routed.memory_of_choice(torch.cat(noted.chosen, 1))[0].tolist()


def rows_of(edited: EditedModel) -> list[Row]:
    answers = edited.model.generate(
        *left_padded([edited.tokenizer(prompt)["input_ids"] for prompt in PROMPTS])[:1],
        attention_mask=left_padded([edited.tokenizer(prompt)["input_ids"] for prompt in PROMPTS])[1],
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, -5:].tolist()
    prompts = (tuple(edited.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    return [Row(prompt, tuple(answer)) for prompt, answer in zip(prompts, answers, strict=True)]


def test_all_who_ask_what_answers_are_told_the_same(
    edited: EditedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    memory, names = tmp_path / "memory", [edit.id for edit in EDITS]
    for prompt, row in zip(PROMPTS, rows_of(edited), strict=True):
        expected, end = by_the_layer(edited, row, monkeypatch), len(row.prompt) - 1
        seen |= set(expected)
        batch = collate([row])
        with edited.unedited():
            base = capture(edited.model, edited.manifest.site, batch)
        measured = edited.routed.memory_of_choice(_routes(edited, base))
        assert measured[0, : len(expected)].tolist() == expected
        decided = edited.choices_of_row(batch)
        assert edited.routed.memory_of_choice(decided.chosen)[: len(expected)].tolist() == expected
        report = explain(memory, prompt, max_new_tokens=5, nearest=0, load=CPU)
        assert [token.routed for token in report.prompt_tokens] == [one != UNROUTED for one in expected[: end + 1]]
        said = expected[end : end + len(report.answer_tokens)]
        assert [token.routed for token in report.answer_tokens] == [one != UNROUTED for one in said]
        if edited.manifest.memory.by_edit:
            told = [token.edit for token in report.answer_tokens if token.routed]
            assert told == [names[one] for one in said if one != UNROUTED]
        (answer,) = generate(memory, [prompt], max_new_tokens=5, explain=True, load=CPU)
        assert [step.memory for step in answer.steps] == [None if one == UNROUTED else one for one in said]
    assert len(seen) > 1


@torch.no_grad()
def test_a_batch_is_decided_as_its_rows_are(edited: EditedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(edited)
    expected = [by_the_layer(edited, row, monkeypatch) for row in rows]
    noted, cache = Decisions(edited.routed, monkeypatch), DynamicCache(config=edited.model.config)
    ids, mask = left_padded([row.prompt for row in rows])
    edited.model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **{CACHE_ARGUMENT: cache})
    for step in range(4):
        mask = torch.cat([mask, mask[:, -1:]], 1)
        token, at = torch.tensor([[row.target[step]] for row in rows]), mask.sum(-1, keepdim=True) - 1
        edited.model(token, attention_mask=mask, position_ids=at, **{CACHE_ARGUMENT: cache})
    found = edited.routed.memory_of_choice(torch.cat(noted.chosen, 1)).tolist()
    for row, own, alone in zip(rows, found, expected, strict=True):
        assert own[-len(row.prompt) - 4 :] == alone


def test_a_forced_memory_answers_from_the_prompts_end_on(edited: EditedModel) -> None:
    batch = collate([Row((5, 6, 7), (8, 9, 10)), Row((11, 12, 13, 14, 15), (16, 17, 18))])
    keys = torch.randn(2, batch.ids.shape[1], edited.manifest.site.d_ff)
    free = edited.choices(keys, batch)
    last, start = len(edited.routed.thresholds) - 1, batch.start
    found = edited.routed.memory_of_choice(edited.choices(keys, batch, forced=torch.tensor([last, UNROUTED])).chosen)
    others = edited.routed.memory_of_choice(free.chosen)
    assert int(found[0, start]) == last
    assert set(found[0, start:].tolist()) <= {last, UNROUTED}
    assert edited.manifest.memory.by_edit or found[0, start:].tolist() == [last] * len(found[0, start:])
    assert torch.equal(found[0, :start], others[0, :start])
    assert torch.equal(found[1], others[1])


def test_padding_is_never_answered_by_a_side_memory(edited: EditedModel) -> None:
    edited.routed.thresholds = (1e-9,) * len(edited.routed.thresholds)
    batch = collate([Row((5, 6), (7,)), Row((8, 9, 10, 11), (12, 13, 14))])
    chosen = edited.choices(torch.randn(2, batch.ids.shape[1], edited.manifest.site.d_ff), batch).chosen
    padding = ~batch.mask.bool()
    assert bool(padding.any())
    assert bool((chosen[padding] == UNROUTED).all())
    assert bool((chosen[~padding] != UNROUTED).any())


# --- the mean over a prompt decides ---


@torch.no_grad()
def test_the_mean_of_a_prompts_scores_decides_for_its_tokens_and_those_after_it(tmp_path: Path) -> None:
    """Against the norms of each update, taken by hand from the unedited model's keys; two turns on one cache."""
    edited = edited_model(tmp_path, edits=EDITS, **KINDS["by mean"])
    memory, limits = edited.manifest.memory, edited.manifest.memory.thresholds
    generator, seen = torch.Generator().manual_seed(5), set()

    def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        changed = output.clone()
        updates = [torch.stack([change(memory, one, key) for key in inputs[0][0]]) for one in range(len(limits))]
        for turn, prompt in ((slice(0, 6), 5), (slice(6, None), 11)):
            called = [float(one[:prompt].norm(dim=-1).mean()) for one in updates]
            beyond = [one for one, limit in enumerate(limits) if called[one] > limit]
            best = max(beyond, key=called.__getitem__, default=None)
            if best is not None:
                changed[0, turn] += updates[best][turn]
            seen.add(best)
        return changed

    for _ in range(8):
        turns = [torch.randint(2, 60, (6,), generator=generator).tolist() for _ in range(2)]
        with edited.unedited(), hooked(edited.model, edited.manifest.site, hook):
            expected = edited.model(torch.tensor([turns[0] + turns[1]]), use_cache=False).logits[0]
        cache, logits = DynamicCache(config=edited.model.config), []
        for part in (turns[0][:5], turns[0][5:], turns[1][:5], turns[1][5:]):
            logits.append(edited.model(torch.tensor([part]), **{CACHE_ARGUMENT: cache}).logits[0])
        assert torch.allclose(torch.cat(logits), expected, atol=2e-3)
    assert len(seen) > 1


def test_of_memories_called_beyond_their_thresholds_the_one_called_most_strongly_answers() -> None:
    delta = torch.stack([torch.eye(3), 2 * torch.eye(3), 5 * torch.eye(3)])
    tensors = {"columns": torch.arange(3).expand(3, 3), "delta": delta}
    memory = SideMemory(tensors, (0.5, 1.5, 9.0), pooling="mean")
    keys = torch.tensor([[[1.0, 0, 0]], [[0.6, 0, 0]], [[0.1, 0, 0]]])  # 1, 2, 5 · then .6, 1.2, 3 · then .1, .2, .5
    ids = torch.zeros(3, 1, dtype=torch.long)
    found = memory_module(memory).decide(WindowStates(ids, ids == 0, keys))
    assert found.memory.tolist() == [1, 0, UNROUTED]  # the first exceeds its threshold by more
    assert found.score_ratio.tolist() == pytest.approx([2 / 1.5, 1.2, 0.2])


# --- a second question on the cache of the first ---


def by_turns(edited: EditedModel, turns: list[list[int]], answer: int) -> tuple[Tensor, list[int | None]]:
    """Logits of a conversation in one pass, each turn's end deciding for it and for ``answer`` tokens after it; what
    each turn opened. All in loops over tokens, through the unedited model.
    """
    memory, site = edited.manifest.memory, edited.manifest.site
    tokens = [token for turn in turns for token in turn]
    ends = [sum(map(len, turns[: number + 1])) - answer for number in range(len(turns))]
    with edited.unedited():
        opened = [choice_of(edited.model, site, memory, tokens[:end]) for end in ends]

    def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        keys, changed, first = inputs[0][0], output.clone(), 0
        for turn, choice in zip(turns, opened, strict=True):
            end = first + len(turn) - answer - 1
            for place in range(end, first + len(turn) if turn is not turns[-1] else len(tokens)):
                if choice is not None and place < first + len(turn):
                    changed[0, place] += residual(memory, choice, keys[place], place=place - end, token=tokens[place])
            first += len(turn)
        return changed

    with edited.unedited(), hooked(edited.model, site, hook):
        return edited.model(torch.tensor([tokens]), use_cache=False).logits[0], opened


@pytest.mark.parametrize("given", ["a cache", "the cache that the model made"])
@pytest.mark.parametrize("kind", ["lookup", "merged", "facts in matrices", "several matrices"])
@torch.no_grad()
def test_a_second_question_on_the_same_cache_is_decided_at_its_own_end(kind: str, given: str, tmp_path: Path) -> None:
    edited = edited_model(tmp_path, edits=EDITS, **KINDS[kind])
    generator, outcomes = torch.Generator().manual_seed(7), set()
    for _ in range(6):
        turns = [torch.randint(2, 60, (length,), generator=generator).tolist() for length in (8, 7, 9)]
        expected, opened = by_turns(edited, turns, answer=2)
        cache = DynamicCache(config=edited.model.config) if given == "a cache" else None
        logits: list[Tensor] = []
        for turn in turns:
            for part in (turn[:-2], turn[-2:-1], turn[-1:]):
                output = edited.model(torch.tensor([part]), use_cache=True, **{CACHE_ARGUMENT: cache})
                cache = cache_returned(output)
                logits.append(output.logits[0])
        assert torch.allclose(torch.cat(logits), expected, atol=2e-3)
        outcomes |= set(pairwise(opened))
    assert any(first != second for first, second in outcomes)


@torch.no_grad()
def test_second_questions_in_a_batch_are_decided_as_each_alone(tmp_path: Path) -> None:
    edited = edited_model(tmp_path, kind="lookup", memories=3, edits=EDITS)
    generator, opened = torch.Generator().manual_seed(6), set()
    rows = [[torch.randint(2, 60, (n,), generator=generator).tolist() for n in (6, length)] for length in (3, 7, 5, 4)]
    cache = DynamicCache(config=edited.model.config)
    mask = torch.ones(len(rows), 6, dtype=torch.long)
    edited.model(torch.tensor([first for first, _ in rows]), attention_mask=mask, **{CACHE_ARGUMENT: cache})
    ids, own = left_padded([second for _, second in rows])
    mask = torch.cat([mask, own], 1)
    at = (mask.cumsum(-1) - 1).clamp(min=0)[:, 6:]
    together = edited.model(ids, attention_mask=mask, position_ids=at, **{CACHE_ARGUMENT: cache}).logits
    for (first, second), logits in zip(rows, together, strict=True):
        alone = DynamicCache(config=edited.model.config)
        edited.model(torch.tensor([first]), **{CACHE_ARGUMENT: alone})
        expected = edited.model(torch.tensor([second]), **{CACHE_ARGUMENT: alone}).logits[0]
        assert torch.allclose(logits[-len(second) :], expected, atol=2e-3)
        opened.add(int(last_memory(alone)))  # type: ignore[arg-type]
    assert len(opened) > 1


@torch.no_grad()
def test_another_copy_of_the_model_goes_on_with_what_a_cache_holds(tmp_path: Path) -> None:
    edited_model(tmp_path, edits=EDITS, kind="lookup", memories=3)
    one, other = (attach(tmp_path / "memory", load=CPU) for _ in range(2))
    opened = set()
    for prompt in PROMPTS:
        ids = torch.tensor([one.tokenizer(prompt)["input_ids"]])
        cache = DynamicCache(config=one.model.config)
        one.model(ids, **{CACHE_ARGUMENT: cache})
        there = copy.deepcopy(cache)
        expected, found = (
            model(torch.tensor([[9]]), **{CACHE_ARGUMENT: own}).logits
            for model, own in ((one.model, cache), (other.model, there))
        )
        assert torch.equal(found, expected)
        opened.add(int(last_memory(there)))  # type: ignore[arg-type]
    assert len(opened) > 1
