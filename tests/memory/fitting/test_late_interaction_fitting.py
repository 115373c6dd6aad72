import pytest
import torch

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.artifacts.shard import PromptStates
from wisecli.memory.fitting.late_interaction_fitting import FittedLateInteraction, fit_late_interaction
from wisecli.memory.merging import quick_cosines

D, WIDTH, EDITS, FORMS, ALIKE = 40, 32, 60, 4, 6


def some_heads() -> RouterHeads:
    """Projections that keep most of a state, and unrelated texts of four tokens each."""
    chance = torch.Generator().manual_seed(0)
    return RouterHeads(
        torch.randn(2, WIDTH, D, generator=chance),
        torch.zeros(2, WIDTH),
        torch.zeros(2, D),
        torch.zeros(2),
        torch.tensor([9.0, 5.0]),
        torch.tensor([0.5, 0.3]),
        torch.tensor([99]),
        torch.tensor([1]),
        torch.randn(48, D, generator=chance),
        torch.arange(12).repeat_interleave(4),
    )


def some_prompts() -> PromptStates:
    """Prompts of edits, six of which have subjects that are alike: three tokens of a subject and three others."""
    chance, rows = torch.Generator().manual_seed(1), EDITS * FORMS * 6
    edit, subject = torch.arange(EDITS).repeat_interleave(FORMS * 6), torch.arange(rows) % 6 < 3
    ways = torch.randn(EDITS // ALIKE, 3, D, generator=chance)
    states = torch.randn(rows, D, generator=chance)
    group = edit[subject] // ALIKE  # of each group subjects are less alike than of the one before
    own = ways[group, torch.arange(rows)[subject] % 3]
    states[subject] = own + (0.4 + 0.2 * group[:, None]) * states[subject]
    return PromptStates(states, edit, torch.arange(rows) // 6 % FORMS, subject, torch.arange(rows))


def test_few_bits_change_no_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted(*, quick: bool) -> FittedLateInteraction:
        monkeypatch.setattr(quick_cosines, "has_quick_int8", lambda: quick)
        return fit_late_interaction(some_heads(), some_prompts(), EDITS)

    exact, few_bits = fitted(quick=False), fitted(quick=True)
    assert torch.allclose(few_bits.own_probs, exact.own_probs, atol=1e-6)
    assert torch.allclose(few_bits.other_probs, exact.other_probs, atol=1e-6)
    least = torch.full((EDITS,), 0.5)
    assert few_bits.thresholds(least) == pytest.approx(exact.thresholds(least), abs=1e-6)
    assert 0.2 < float((exact.other_probs > 0.3).float().mean()) < 1
