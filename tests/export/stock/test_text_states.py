from pathlib import Path

import pytest
import torch
from support.helpers import random_rows, save_tiny
from support.loading import CPU

from wisecli.export.stock.text_states import StateCapture, rotation_of
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.progress import ignore_progress

LAYER = 2
# Of several lengths, some with a common beginning, more than a batch holds.
TEXTS = [row.prompt for row in random_rows((5, 1), (12, 1), (7, 1), (9, 1))]
TEXTS += [(*TEXTS[1], 5, 6), (*TEXTS[1], 7)]


@pytest.mark.parametrize("architecture", ["llama", "granite"])
@pytest.mark.parametrize("batch_size", [1, 4])
@torch.no_grad()
def test_states_are_the_models_own_normed(tmp_path: Path, architecture: str, batch_size: int) -> None:
    base = save_tiny(tmp_path, architecture)
    loaded, site = load_model(base, CPU), find_site(base, Checkpoint(base), LAYER)
    found = StateCapture(loaded, site, ignore_progress, batch_size).text_states(TEXTS, "texts")
    assert found.normed.dtype == torch.float16
    assert found.first.tolist() == [0, 5, 17, 24, 33, 47, 60]
    for number, tokens in enumerate(TEXTS):
        read = loaded.model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        hidden = read.hidden_states[LAYER + 1][0].float()
        inverse = torch.rsqrt(hidden.square().mean(-1) + loaded.model.config.rms_norm_eps)
        own = found.of(number)
        torch.testing.assert_close(found.inverse[own], inverse, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.normed[own].float(), hidden * inverse[:, None], rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_states_at_one_place_are_those_of_all(tmp_path: Path) -> None:
    base = save_tiny(tmp_path)
    capture = StateCapture(load_model(base, CPU), find_site(base, Checkpoint(base), LAYER), ignore_progress, 2)
    places, every = [4, 0, 3, 8, 13, 11], capture.text_states(TEXTS, "texts")
    found = capture.states_at(TEXTS, places, "texts")
    wanted = every.normed[every.first[:-1] + torch.tensor(places)].float()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_the_rotation_is_the_models_own(tmp_path: Path) -> None:
    base = save_tiny(tmp_path, "granite")
    loaded, site = load_model(base, CPU), find_site(base, Checkpoint(base), LAYER)
    found = rotation_of(loaded, site, 9)
    cos, sin = loaded.model.model.rotary_emb(torch.zeros(1), torch.arange(9)[None])
    assert torch.equal(found.cos, cos[0])
    assert torch.equal(found.sin, sin[0])
    assert found.scaling == loaded.model.config.attention_multiplier
