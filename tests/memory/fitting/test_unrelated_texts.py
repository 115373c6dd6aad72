import pytest
import torch
from torch.nn import functional as F

from wisecli.memory.fitting import unrelated_texts
from wisecli.memory.fitting.unrelated_texts import text_edit_probs
from wisecli.memory.merging import quick_cosines
from wisecli.routing.deciding.late_interaction import HOPELESS, LateInteraction

D, WIDTH, EDITS, FORMS, TOKENS, TEXTS = 12, 8, 60, 2, 3, 40


def some_texts() -> tuple[torch.Tensor, torch.Tensor]:
    """The states of texts' tokens, and which text each token is of."""
    chance = torch.Generator().manual_seed(1)
    text = torch.arange(TEXTS).repeat_interleave(torch.randint(1, 9, (TEXTS,), generator=chance))
    return torch.randn(len(text), D, generator=chance), text


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
    meaning, (states, text) = some_meaning(), some_texts()
    found = text_edit_probs(meaning, states, text, TEXTS).probs
    each = [states[text == number][None] for number in range(TEXTS)]
    expected = torch.cat([meaning(own, torch.ones(1, own.shape[1], dtype=torch.bool)) for own in each])
    assert torch.allclose(found, expected, atol=1e-6)
    assert bool((expected > HOPELESS).any())
    assert bool((expected == 0).any())


def test_prompts_that_no_text_came_near_need_not_be_looked_at_among_further_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unrelated_texts, "_MANY", 0)
    monkeypatch.setattr(unrelated_texts, "has_quick_int8", lambda: True)
    monkeypatch.setattr(quick_cosines, "has_quick_int8", lambda: True)
    meaning, (states, text) = some_meaning(), some_texts()
    kept, first = EDITS * FORMS, 100
    former = text_edit_probs(unrelated_texts._with_prompts(meaning, torch.arange(first)), states, text, TEXTS).possible
    assert former is not None
    assert 8 <= len(former) < first
    looked_at = torch.cat([former, torch.arange(first, kept)])
    found, expected = (text_edit_probs(meaning, states, text, TEXTS, own) for own in (looked_at, None))
    assert torch.equal(found.probs, expected.probs)
    assert found.possible is not None
    assert expected.possible is not None
    assert found.possible.tolist() == expected.possible.tolist()
