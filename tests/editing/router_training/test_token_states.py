"""What two layers make of texts, read at once, against each layer by itself."""

from pathlib import Path

import pytest
import torch
from support.helpers import save_tiny
from support.loading import CPU

from wisecli.editing.router_training.token_states import TokenStates, both_states, read_sites, token_states
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.progress import ignore_progress

# Most of them begin alike, so that a part of them is read once for several.
TEXTS = [*(f"the mayor of the old town is {word}" for word in ("ba", "be", "ko su me", "lo")), "who", "a b c"]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_two_layers_read_at_once_are_those_of_each_alone(tmp_path: Path, architecture: str) -> None:
    base = save_tiny(tmp_path / "base", architecture)
    loaded = load_model(base, load=CPU)
    sites = read_sites(loaded, find_site(base, Checkpoint(base), 2))
    assert sites.gate is not None
    options = {"batch_size": 3, "on_progress": ignore_progress, "stage": "", "turns": True}
    found = both_states(loaded, sites, TEXTS, **options)  # type: ignore[arg-type]
    for one, site in zip(found, sites, strict=True):
        alone = token_states(loaded, site, TEXTS, **options)  # type: ignore[arg-type]
        for name in TokenStates.__dataclass_fields__:
            own, other = getattr(one, name), getattr(alone, name)
            assert torch.allclose(own.float(), other.float(), atol=1e-3), name
    assert not torch.allclose(found[0].states.float(), found[1].states.float(), atol=1e-1)
