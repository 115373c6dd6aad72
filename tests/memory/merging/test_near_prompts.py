import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import PromptStates
from wisecli.memory.merging import quick_cosines
from wisecli.memory.merging.near_prompts import Groups, NearPrompts
from wisecli.routing.deciding.late_interaction import HOPELESS, LateInteraction

D, WIDTH, EDITS, FORMS, TOKENS = 12, 8, 20, 2, 3


def some_meaning() -> LateInteraction:
    """Edits whose subjects are alike in fives, with two kept prompts each."""
    chance = torch.Generator().manual_seed(0)
    kept = EDITS * FORMS
    alike = torch.randn(5, WIDTH, generator=chance).repeat_interleave(4 * FORMS * TOKENS, 0)
    subject = alike + 0.5 * torch.randn(alike.shape, generator=chance)
    vectors = torch.cat([subject, torch.randn(kept * TOKENS, WIDTH, generator=chance)])
    tensors = {
        "late_interaction.proj_weight": torch.randn(2, WIDTH, D, generator=chance),
        "late_interaction.proj_bias": torch.zeros(2, WIDTH),
        "late_interaction.logit_scale": torch.tensor([9.0, 5.0]),
        "late_interaction.logit_offset": torch.tensor([0.5, 0.3]),
        "late_interaction.prompt_token_embeddings": F.normalize(vectors, dim=-1),
        "late_interaction.token_to_prompt": torch.arange(2 * kept).repeat_interleave(TOKENS),
        "late_interaction.token_weights": torch.full((2 * kept * TOKENS,), 1 / TOKENS),
        "late_interaction.prompt_to_edit": torch.arange(EDITS).repeat_interleave(FORMS),
        "late_interaction.special_token_ids": torch.tensor([99]),
    }
    return LateInteraction(tensors, EDITS)


def some_prompts() -> tuple[PromptStates, Tensor]:
    """The states of all kept prompts, two to seven tokens of each, and which prompt each token is of."""
    chance = torch.Generator().manual_seed(1)
    prompt = torch.arange(EDITS * FORMS).repeat_interleave(torch.randint(2, 8, (EDITS * FORMS,), generator=chance))
    states = torch.randn(len(prompt), D, generator=chance)
    subject = torch.zeros(len(prompt), dtype=torch.bool)
    return PromptStates(states, prompt // FORMS, prompt % FORMS, subject, prompt), prompt


def near_prompts_of(meaning: LateInteraction, prompts: PromptStates, prompt: Tensor) -> NearPrompts:
    """The prompts, compared by what the projections make of their tokens."""
    projected = meaning.project(prompts.states[None], torch.ones(1, len(prompt), dtype=torch.bool)).projected[:, 0]
    return NearPrompts(meaning, projected, prompt)


def expected_probs(meaning: LateInteraction, prompts: PromptStates, prompt: Tensor) -> Tensor:
    """How likely each kept prompt means each edit (g, M), one prompt after the other."""
    every = [prompts.states[prompt == number][None] for number in range(EDITS * FORMS)]
    return torch.cat([meaning(own, torch.ones(1, own.shape[1], dtype=torch.bool)) for own in every])


def test_prompts_mean_edits_as_likely_as_if_each_were_asked() -> None:
    meaning, (prompts, prompt) = some_meaning(), some_prompts()
    near, expected = near_prompts_of(meaning, prompts, prompt), expected_probs(meaning, prompts, prompt)
    edits = torch.arange(EDITS)
    asking, meant = edits.repeat_interleave(EDITS), edits.repeat(EDITS)
    wanted = expected.view(EDITS, FORMS, EDITS).transpose(1, 2).flatten(0, 1)
    found = near.probs(asking, meant, torch.full((len(meant),), HOPELESS))
    high = wanted > HOPELESS
    assert torch.allclose(found[high], wanted[high], atol=1e-6)
    # However low it is, a likelihood is known where it is asked for.
    assert bool((near.probs(asking, meant, torch.zeros(len(meant))) > 0).all())


@pytest.mark.parametrize("kind", [torch.float32, torch.int8])
def test_edits_with_similar_subjects_are_found(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype) -> None:
    monkeypatch.setattr(quick_cosines, "has_quick_int8", lambda: kind == torch.int8)
    meaning, (prompts, prompt) = some_meaning(), some_prompts()
    near, expected = near_prompts_of(meaning, prompts, prompt), expected_probs(meaning, prompts, prompt)
    asking, meant = near.similar_edits(torch.zeros(EDITS * FORMS, dtype=torch.long))
    alike = meant.split(torch.bincount(asking).tolist())
    assert len(alike) == EDITS
    likely = 0
    for edit, found in enumerate(alike):
        assert edit in found
        assert found.unique().tolist() == found.tolist()
        rows = expected[edit * FORMS : (edit + 1) * FORMS]
        likely += int((rows >= HOPELESS).any(0).sum())
        assert set((rows >= HOPELESS).any(0).nonzero().flatten().tolist()) <= set(found.tolist())
    assert likely > 20
    assert sum(map(len, alike)) < EDITS * EDITS


def test_prompts_in_no_group_are_compared_with_none() -> None:
    near = near_prompts_of(some_meaning(), *some_prompts())
    asking, meant = near.similar_edits(torch.full((EDITS * FORMS,), -1))
    assert asking.tolist() == meant.tolist() == list(range(EDITS))


def test_padding_is_a_groups_first_row() -> None:
    rows, there = Groups(torch.tensor([1, 0, 1, 1]), 3).padded(torch.tensor([[0, 1]]))
    assert rows.tolist() == [[[1, 1, 1], [0, 2, 3]]]
    assert there.tolist() == [[[True, False, False], [True, True, True]]]


def test_a_group_without_rows_has_padding_alone() -> None:
    assert not Groups(torch.tensor([0, 1]), 3).padded(torch.tensor([2]))[1].any()
