"""Misspelt names are compared as the subjects that they are meant to be, and others as they are."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.routing.deciding.fuzzy_match import FuzzyMatch
from wisecli.routing.deciding.late_interaction import LateInteraction, ProjectedPrompts
from wisecli.routing.deciding.misspelt_names import read_as_meant
from wisecli.routing.deciding.prompt_words import LETTER, SEPARATOR, TOKEN_CHARS
from wisecli.routing.memories.subject_tensors import fuzzy_match_tensors

VOCABULARY = [" who", " runs", " ada", " nel", "son", "sno", " nils", "on"]
WIDTH = 16


def vectors(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def spelling() -> FuzzyMatch:
    numbers = [[SEPARATOR if one == " " else LETTER + ord(one) - ord("a") for one in text] for text in VOCABULARY]
    table = torch.tensor([[*row, *[0] * (TOKEN_CHARS - len(row))] for row in numbers], dtype=torch.uint8)
    return FuzzyMatch(fuzzy_match_tensors(table, [[2, 3, 4]]))  # Ada Nelson


@pytest.fixture
def late_interaction() -> LateInteraction:
    """One edit, on Ada Nelson, of three tokens as a subject and two as a relation."""
    tensors = {
        "proj_weight": torch.eye(WIDTH).repeat(2, 1, 1),
        "proj_bias": torch.zeros(2, WIDTH),
        "logit_scale": torch.full((2,), 12.0),
        "logit_offset": torch.full((2,), 0.6),
        "prompt_token_embeddings": vectors(5, 0),
        "token_to_prompt": torch.tensor([0, 0, 0, 1, 1]),
        "token_weights": torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5]),
        "prompt_to_edit": torch.tensor([0]),
        "special_token_ids": torch.zeros(0, dtype=torch.long),
    }
    return LateInteraction({f"late_interaction.{name}": tensor for name, tensor in tensors.items()}, 1)


def test_a_misspelt_name_stands_for_the_subject(spelling: FuzzyMatch, late_interaction: LateInteraction) -> None:
    ids = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 6, 7]])  # Nelson, Nelsno, Nilson
    states, own = vectors(15, 1).view(3, 5, WIDTH), late_interaction.prompt_token_embeddings
    states[:, :3] = own[[3, 4, 0]]
    states[0, 3:] = own[1:3]
    there = torch.ones_like(ids, dtype=torch.bool)
    prompts = ProjectedPrompts(torch.stack([states, states]), there)
    letters = spelling.characters(ids, there)
    named = torch.ones(3, 1, dtype=torch.bool)
    found = read_as_meant(prompts, letters, named, late_interaction, spelling)
    assert list(found) == [(1, 0)]  # of another name a letter is another
    spelt = found[1, 0].projected
    assert torch.equal(spelt[0, 0], prompts.projected[0, 0])
    assert torch.equal(spelt[1], prompts.projected[1, 1:2])
    whole, misspelt, other = late_interaction.edit_prob(prompts, 0)
    assert misspelt < 0.5
    assert other < 0.5
    assert late_interaction.edit_prob(found[1, 0], 0)[0] == whole > 0.9
    assert read_as_meant(prompts, letters, ~named, late_interaction, spelling) == {}
