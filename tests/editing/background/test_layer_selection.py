from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_type import save_type, tiny_config
from support.helpers import keys_of, save_tiny
from support.loading import CPU

from wisecli.data.corpus import reworded_facts
from wisecli.editing.background import layer_selection
from wisecli.editing.background.layer_selection import keys_in_two_wordings, probe_layer, recognition_rate
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.layout_inference import find_layout
from wisecli.models.layout.site import Site, find_site, fingerprint
from wisecli.models.layout.site_probe import verified_layout
from wisecli.models.loading import Loaded, load_model
from wisecli.progress import Event, ignore_progress


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("layers") / "model")


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Loaded:
    return load_model(directory, load=CPU)


def sites(directory: Path, *numbers: int) -> list[Site]:
    return [find_site(directory, Checkpoint(directory), number) for number in numbers]


def test_every_layer_is_judged_by_its_own_keys(directory: Path, loaded: Loaded) -> None:
    facts = [ways[:2] for ways in reworded_facts(3, seed=0)]
    found = keys_in_two_wordings(loaded, sites(directory, 0, 2, 3), batch_size=16)
    for site, keys in zip(sites(directory, 0, 2, 3), found, strict=True):
        ends = [
            torch.stack([keys_of(loaded.model, site, loaded.tokenizer(fact[way])["input_ids"])[-1] for fact in facts])
            for way in (0, 1)
        ]
        assert all(torch.allclose(own, end, atol=1e-5) for own, end in zip(keys, ends, strict=True))
        every = torch.cat(ends).double()
        moment = every.T @ every / len(every)
        inverse = torch.linalg.inv(moment + 0.1 * moment.trace() / len(moment) * torch.eye(len(moment)))
        root = torch.linalg.cholesky(inverse)
        first, second = (torch.nn.functional.normalize(end.double() @ root, dim=-1) for end in ends)
        near = second @ first.T
        right = torch.arange(len(facts))
        expected = ((near.argmax(0) == right).double().mean() + (near.argmax(1) == right).double().mean()) / 2
        assert recognition_rate(*keys) == pytest.approx(float(expected), abs=2 / len(facts))


def test_the_usual_layer_stays_unless_another_is_clearly_better(
    directory: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(directory)
    identity = fingerprint(directory, checkpoint, sites(directory, 3)[0])
    monkeypatch.setattr(layer_selection, "_LOWEST", 0.0)
    for name, margin in (("usual", 1.0), ("best", -1.0)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        monkeypatch.setattr(layer_selection, "_CLEARLY", margin)
        told: list[Event] = []
        named: dict[str, Any] = {"batch_size": 16, "on_progress": told.append}
        chosen = probe_layer(loaded, directory, checkpoint, identity, **named)
        shares = [
            recognition_rate(*keys)
            for keys in keys_in_two_wordings(loaded, sites(directory, 0, 1, 2, 3), batch_size=16)
        ]
        assert chosen.layer == (3 if name == "usual" else max(range(4), key=shares.__getitem__))
        assert [event.stage for event in told] == ["layers"]
        again = probe_layer(loaded, directory, checkpoint, identity, **named)
        assert again == chosen
        assert len(told) == 1  # remembered


def test_a_single_candidate_needs_no_probe(directory: Path, loaded: Loaded) -> None:
    checkpoint = Checkpoint(directory)
    identity = fingerprint(directory, checkpoint, sites(directory, 3)[0])
    assert probe_layer(loaded, directory, checkpoint, identity, batch_size=16, on_progress=ignore_progress).layer == 3


def test_layers_that_text_passes_over_are_no_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tiny_config("mllama").text_config
    text.num_hidden_layers, text.cross_attention_layers = 8, [1, 5]  # those read images
    base = save_type(tmp_path / "model", "mllama", text_config=text)
    loaded, checkpoint = load_model(base, CPU), Checkpoint(base)
    layout = verified_layout(loaded.model, base, checkpoint, find_layout(base, checkpoint, lookup=True), "auto")
    identity = fingerprint(base, checkpoint, find_site(base, checkpoint, "auto", layout))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    named: dict[str, Any] = {"batch_size": 16, "on_progress": ignore_progress, "layout": layout}
    assert probe_layer(loaded, base, checkpoint, identity, **named).layer == 6


def test_layers_are_counted_in_the_model_where_the_config_counts_others(tmp_path: Path) -> None:
    base = save_type(tmp_path, "dory")  # halves of layers
    loaded, checkpoint = load_model(base, CPU), Checkpoint(base)
    layout = find_layout(base, checkpoint, lookup=True)
    identity = fingerprint(base, checkpoint, find_site(base, checkpoint, "auto", layout))
    named: dict[str, Any] = {"batch_size": 16, "on_progress": ignore_progress, "layout": layout}
    assert probe_layer(loaded, base, checkpoint, identity, **named).layer == 3
