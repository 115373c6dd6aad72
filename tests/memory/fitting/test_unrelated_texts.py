import pytest
import torch
from torch.nn import functional as F

from wisecli.memory.fitting import unrelated_texts
from wisecli.memory.fitting.unrelated_texts import text_edit_probs
from wisecli.memory.merging import quick_cosines
from wisecli.routing.deciding.late_interaction import HOPELESS, LateInteraction

D, WIDTH, EDITS, FORMS, TOKENS, TEXTS = 12, 8, 60, 2, 3, 40


def some_meaning() -> LateInteraction:
    """Edits with two kept prompts each, of three tokens a head."""
    chance, kept = torch.Generator().manual_seed(0), EDITS * FORMS
    tensors = {
        "late_interaction.proj_weight": torch.randn(2, WIDTH, D, generator=chance),
        "late_interaction.proj_bias": torch.zeros(2, WIDTH),
        "late_interaction.logit_scale": torch.tensor([9.0, 5.0]),
        "late_interaction.logit_offset": torch.tensor([0.7, 0.3]),
        "late_interaction.prompt_token_embeddings": F.normalize(
            torch.randn(2 * kept * TOKENS, WIDTH, generator=chance), dim=-1
        ),
        "late_interaction.token_to_prompt": torch.arange(2 * kept).repeat_interleave(TOKENS),
        "late_interaction.token_weights": torch.full((2 * kept * TOKENS,), 1 / TOKENS),
        "late_interaction.prompt_to_edit": torch.arange(EDITS).repeat_interleave(FORMS),
        "late_interaction.special_token_ids": torch.tensor([99]),
    }
    return LateInteraction(tensors, EDITS)


@pytest.mark.parametrize("many", [0, 10**9])
def test_texts_mean_edits_as_likely_as_if_each_were_compared_with_all(
    many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unrelated_texts, "_MANY", many)
    monkeypatch.setattr(unrelated_texts, "has_quick_int8", lambda: True)
    monkeypatch.setattr(quick_cosines, "has_quick_int8", lambda: True)
    meaning, chance = some_meaning(), torch.Generator().manual_seed(1)
    text = torch.arange(TEXTS).repeat_interleave(torch.randint(1, 9, (TEXTS,), generator=chance))
    states = torch.randn(len(text), D, generator=chance)
    found = text_edit_probs(meaning, states, text, TEXTS)
    each = [states[text == number][None] for number in range(TEXTS)]
    expected = torch.cat([meaning(own, torch.ones(1, own.shape[1], dtype=torch.bool)) for own in each])
    assert torch.allclose(found, expected, atol=1e-6)
    assert bool((expected > HOPELESS).any())
    assert bool((expected == 0).any())
