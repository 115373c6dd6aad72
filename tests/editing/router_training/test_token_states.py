"""What two layers make of texts, read at once, against each layer by itself."""

from dataclasses import replace
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
@pytest.mark.parametrize("memory_budget", [None, 1 << 16], ids=["held whole", "streamed"])
def test_two_layers_read_at_once_are_those_of_each_alone(
    tmp_path: Path, architecture: str, memory_budget: int | None
) -> None:
    base = save_tiny(tmp_path / "base", architecture)
    loaded = load_model(base, load=replace(CPU, memory_budget=memory_budget))
    assert (loaded.stream is not None) == (memory_budget is not None)
    sites = read_sites(loaded, find_site(base, Checkpoint(base), 2))
    assert sites.gate is not None
    options = {"batch_size": 3, "on_progress": ignore_progress, "stage": ""}
    chunks = list(both_states(loaded, sites, TEXTS, turns=[False] * len(TEXTS), at_a_time=3, **options))  # type: ignore[arg-type]
    assert len(chunks) == 2
    assert sorted(number for one in chunks for number in one.numbers) == list(range(len(TEXTS)))
    for chunk in chunks:
        texts = [TEXTS[number] for number in chunk.numbers]
        for one, site in zip((chunk.router, chunk.gate), sites, strict=True):
            assert site is not None
            alone = token_states(loaded, site, texts, **options)  # type: ignore[arg-type]
            for name in TokenStates.__dataclass_fields__:
                own, other = getattr(one, name), getattr(alone, name)
                assert torch.allclose(own.float(), other.float(), atol=1e-3), name
        assert chunk.gate is not None
        assert not torch.allclose(chunk.router.states.float(), chunk.gate.states.float(), atol=1e-1)


def test_earlier_turns_are_looked_at_of_those_texts_alone_that_are_meant(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    loaded = load_model(base, load=CPU)
    begin, *_ = loaded.tokenizer.all_special_tokens
    text = "".join(f"{begin} {turn}" for turn in ("user who is the mayor", "no", "user and of the town", "no"))
    sites = read_sites(loaded, find_site(base, Checkpoint(base), 2))
    (chunk,) = both_states(
        loaded,
        sites,
        [text, text],
        turns=[False, True],
        batch_size=8,
        on_progress=ignore_progress,
        stage="",
        at_a_time=8,
    )
    earlier = [chunk.router.in_earlier_turn[chunk.router.text == number] for number in range(2)]
    assert not earlier[0].any()
    assert earlier[1].any() and not earlier[1].all()
