"""Decisions of whole batches, against the loops of ``tests/reference/wise.py``."""

import pytest
import torch
from reference.wise import compared_tokens, decide, scores_of
from support.drawing import seeded
from torch import Tensor
from torch.nn import functional as F

from wisecli.routing.deciding.decision import Decision, WindowStates
from wisecli.routing.deciding.late_interaction import compared_tokens as compared_mask
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.layers.routed_layer import memory_module
from wisecli.routing.memories.side_memory import SideMemory
from wisecli.routing.memories.subject_tensors import SubjectToken, subject_match_tensors

D, WIDTH, EDITS, KEPT, VOCABULARY, SPECIAL = 10, 5, 4, 8, 30, (1, 2)


def drawn_prompts(seed: int) -> tuple[list[list[int]], WindowStates]:
    """Token ids of prompts of many lengths, special tokens among them, and the same padded with states or keys."""
    drawn, sizes = seeded(seed), [1, 2, 3, 5, 8, 13, 21]
    rows = [torch.randint(0, VOCABULARY, (size,), generator=drawn).tolist() for size in sizes]
    ids = torch.tensor([[*row, *[0] * (max(sizes) - len(row))] for row in rows])
    non_padding = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return rows, WindowStates(ids, non_padding, torch.randn(*ids.shape, D, generator=drawn))


def fact_memory(seed: int, *, named: bool) -> SideMemory:
    """Edits with two kept prompts each, of two tokens for their subjects and three for their relations."""
    drawn, prompt = seeded(seed), torch.arange(KEPT)
    tensors = {
        "columns": torch.zeros(1, 1, dtype=torch.long),
        "delta": torch.zeros(1, D, 1),
        "edit_to_matrix": torch.zeros(EDITS, dtype=torch.long),
        "late_interaction.proj_weight": torch.randn(2, WIDTH, D, generator=drawn),
        "late_interaction.proj_bias": torch.randn(2, WIDTH, generator=drawn),
        "late_interaction.logit_scale": torch.tensor([4.0, 3.0]),
        "late_interaction.logit_offset": torch.tensor([0.2, 0.1]),
        "late_interaction.prompt_token_embeddings": F.normalize(torch.randn(5 * KEPT, WIDTH, generator=drawn), dim=-1),
        "late_interaction.token_to_prompt": torch.cat(
            [prompt.repeat_interleave(2), KEPT + prompt.repeat_interleave(3)]
        ),
        "late_interaction.token_weights": torch.cat([torch.full((2 * KEPT,), 1 / 2), torch.full((3 * KEPT,), 1 / 3)]),
        "late_interaction.prompt_to_edit": prompt // 2,
        "late_interaction.special_token_ids": torch.tensor(SPECIAL),
    }
    words = [tuple(SubjectToken((token, token + 1), 1 / 2) for token in range(first, 15, 6)) for first in range(3, 6)]
    names = subject_match_tensors([*((own,) for own in words), ()]) if named else {}
    return SideMemory({**tensors, **names}, (0.52, 0.5, 0.51, 0.5), state_layer=0)


def require_same(found: Decision, memory: SideMemory, rows: list[list[int]], read: Tensor) -> set[int | None]:
    """Check a batch's decisions one by one; what they are."""
    expected = [decide(memory, row, read[number, : len(row)]) for number, row in enumerate(rows)]
    assert found.memory.tolist() == [UNROUTED if one is None else one for one in expected]
    for number, row in enumerate(rows):
        scores = scores_of(memory, row, read[number, : len(row)])
        ratios = [score / limit for score, limit in zip(scores, memory.thresholds, strict=True)]
        chosen = int(found.memory[number])
        best = max(ratios) if chosen == UNROUTED else ratios[chosen]
        assert float(found.score_ratio[number]) == pytest.approx(best, rel=1e-3, abs=1e-5)
    return set(expected)


@pytest.mark.parametrize("named", [False, True])
def test_late_interaction_decides_as_loops_do(*, named: bool) -> None:
    seen: set[int | None] = set()
    for seed in range(8):
        memory, (rows, window) = fact_memory(seed, named=named), drawn_prompts(seed)
        seen |= require_same(memory_module(memory).decide(window), memory, rows, window.states)
    assert None in seen and len(seen) >= EDITS


def test_the_tokens_compared_are_those_of_loops() -> None:
    for seed in range(20):
        rows, window = drawn_prompts(seed)
        first = torch.zeros_like(window.non_padding)
        first[:, 0] = True
        found = compared_mask(window.ids, window.non_padding, first, torch.tensor(SPECIAL))
        assert [row.nonzero().flatten().tolist() for row in found] == [compared_tokens(row, SPECIAL) for row in rows]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_norms_decide_as_loops_do(pooling: str) -> None:
    seen: set[int | None] = set()
    for seed in range(8):
        rows, window = drawn_prompts(seed)
        columns = torch.stack([torch.randperm(D, generator=seeded(seed + one))[:4] for one in range(3)])
        delta = torch.randn(3, 6, 4, generator=seeded(seed))
        memory = SideMemory({"columns": columns, "delta": delta}, (4.4, 4.2, 4.6), pooling=pooling)
        seen |= require_same(memory_module(memory).decide(window), memory, rows, window.states)
    assert seen == {None, 0, 1, 2}
