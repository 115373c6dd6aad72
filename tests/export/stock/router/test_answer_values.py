"""Directions for a token, as a model's own norm and head read them: that token leads from any state."""

import pytest
import torch
from support.helpers import save_tiny
from support.loading import CPU
from torch import Tensor

from wisecli.export.stock.edit_states import Next
from wisecli.export.stock.router.answer_values import answer_values
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import Site, find_site
from wisecli.models.loading import Loaded, load_model


@pytest.fixture(scope="module", params=["llama", "granite"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Site]:
    """A tiny model whose head has rows of any length and a common part, as those of real models have."""
    base = save_tiny(tmp_path_factory.mktemp(request.param), request.param)
    loaded = load_model(base, CPU)
    head, generator = loaded.model.get_output_embeddings().weight.data, torch.Generator().manual_seed(1)
    head.normal_(generator=generator).mul_(0.5 + torch.rand(len(head), 1, generator=generator)).add_(
        torch.randn(head.shape[1], generator=generator)
    )
    loaded.model.model.norm.weight.data.uniform_(0.5, 2.0, generator=generator)
    return loaded, find_site(base, Checkpoint(base), 2)


@torch.no_grad()
def likeliest(loaded: Loaded, states: Tensor) -> Tensor:
    """The token that comes next at states (n, d) behind the last layer."""
    found: Tensor = loaded.model.get_output_embeddings()(loaded.model.model.norm(states)).argmax(-1)
    return found


def states_of_length(loaded: Loaded, length: float) -> Tensor:
    states = torch.randn(50, loaded.model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    return states * (length / states.norm(dim=-1, keepdim=True))


def test_the_token_leads_all_others_from_any_state(model: tuple[Loaded, Site]) -> None:
    loaded, site = model
    tokens = range(4, 60)
    directions = answer_values(loaded, site, [Next(token, None) for token in tokens])
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(len(tokens)))
    states = states_of_length(loaded, 7.0)
    right = [likeliest(loaded, states + 50.0 * one) == token for token, one in zip(tokens, directions, strict=True)]
    assert torch.stack(right).float().mean() > 0.99
    assert torch.stack([likeliest(loaded, states) == token for token in tokens]).float().mean() < 0.1


def test_what_is_erased_does_not_come_next(model: tuple[Loaded, Site]) -> None:
    # A fifth of the way that a said token is pushed.
    loaded, site = model
    states = states_of_length(loaded, 7.0)
    wanted = likeliest(loaded, states).tolist()
    away = answer_values(loaded, site, [Next(0, (token, 5)) for token in wanted])
    assert not (likeliest(loaded, states + 70.0 * away) == torch.tensor(wanted)).any()


def test_where_nothing_is_unwanted_nothing_is_added(model: tuple[Loaded, Site]) -> None:
    assert not answer_values(*model, [Next(7, ())]).any()
