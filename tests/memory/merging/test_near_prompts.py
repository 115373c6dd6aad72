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
        "meaning.turns": torch.randn(2, WIDTH, D, generator=chance),
        "meaning.shifts": torch.zeros(2, WIDTH),
        "meaning.slopes": torch.tensor([9.0, 5.0]),
        "meaning.bars": torch.tensor([0.5, 0.3]),
        "meaning.vectors": F.normalize(vectors, dim=-1),
        "meaning.asking": torch.arange(2 * kept).repeat_interleave(TOKENS),
        "meaning.shares": torch.full((2 * kept * TOKENS,), 1 / TOKENS),
        "meaning.whose": torch.arange(EDITS).repeat_interleave(FORMS),
        "meaning.breaks": torch.tensor([99]),
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
