"""What a conversation asks: its last turn says a part of it, and an earlier one the rest."""

import torch
from torch import Tensor

from wisecli.routing.deciding.late_interaction import LateInteraction, ProjectedPrompts

D = 4
SUBJECT, RELATION, OTHER, WORD = torch.eye(D)


def meaning() -> LateInteraction:
    """One edit, of a token of each: both projections are the states themselves."""
    tensors = {
        "late_interaction.proj_weight": torch.eye(D).repeat(2, 1, 1),
        "late_interaction.proj_bias": torch.zeros(2, D),
        "late_interaction.logit_scale": torch.full((2,), 30.0),
        "late_interaction.logit_offset": torch.full((2,), 0.5),
        "late_interaction.prompt_token_embeddings": torch.stack([SUBJECT, RELATION]),
        "late_interaction.token_to_prompt": torch.tensor([0, 1]),
        "late_interaction.token_weights": torch.ones(2),
        "late_interaction.prompt_to_edit": torch.tensor([0]),
        "late_interaction.special_token_ids": torch.tensor([99]),
    }
    return LateInteraction(tensors, 1)


def sure(earlier: list[Tensor], last: list[Tensor]) -> float:
    states = torch.stack([*earlier, *last])[None]
    there = torch.ones(1, states.shape[1], dtype=torch.bool)
    own = torch.tensor([[False] * len(earlier) + [True] * len(last)])
    return float(meaning().edit_probs(ProjectedPrompts(states.repeat(2, 1, 1, 1), there), own))


def test_the_last_turn_must_say_a_part_of_what_is_asked() -> None:
    assert sure([SUBJECT, WORD], [RELATION, WORD]) > 0.99
    assert sure([OTHER, RELATION], [SUBJECT]) > 0.99
    assert sure([WORD], [SUBJECT, RELATION]) > 0.99
    assert sure([SUBJECT, RELATION], [WORD]) < 0.01
    assert sure([SUBJECT], [WORD]) < 0.01
    assert sure([WORD], [RELATION]) < 0.01
