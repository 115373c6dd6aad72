from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from wisecli.memory.merging import near_prompts
from wisecli.memory.merging.near_prompts import NearPrompts
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


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_what_is_likely_enough_is_found_as_if_all_were_compared(
    monkeypatch: pytest.MonkeyPatch, kind: torch.dtype
) -> None:
    monkeypatch.setattr(near_prompts, "_comparison_dtype", lambda: kind)
    meaning, chance = some_meaning(), torch.Generator().manual_seed(1)
    states = torch.randn(64, 7, D, generator=chance)
    there = torch.arange(7) < torch.randint(2, 8, (64, 1), generator=chance)
    own = torch.randint(EDITS, (64,), generator=chance)
    asked = meaning.project(states, there)
    expected, found = meaning.edit_probs(asked), NearPrompts(meaning)(asked, own)
    every = torch.arange(EDITS * FORMS)
    subjects = meaning.log_probs(asked, 0, every).exp().view(64, EDITS, FORMS).amax(-1)
    certain = (subjects >= HOPELESS) & (expected > 0)
    assert int(certain.sum()) > 20
    assert torch.allclose(found[certain], expected[certain], atol=1e-6)
    assert float(found[subjects < HOPELESS - 1e-3].max()) < HOPELESS
    # Of its own edit a prompt's likelihood is known however low it is.
    assert bool((found.gather(1, own[:, None]) > 0).all())
