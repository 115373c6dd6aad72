"""Router heads that come with the package: for which models they are, and what is read anew."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.helpers import save_tiny
from support.loading import CPU
from torch import Tensor
from torch.testing import assert_close

from wisecli.artifacts.background_stats import RouterHeads, load_heads
from wisecli.config import EditSettings
from wisecli.editing.background.background_cache import BackgroundReader
from wisecli.editing.router_training.router_heads import heads_key, package_heads, router_heads
from wisecli.editing.router_training.token_states import ReadSites, read_sites
from wisecli.io.checkpoint import Checkpoint, load_tensors, save_tensors
from wisecli.io.packaged_weights import PACKAGED, packaged_file
from wisecli.models.base_identity import BaseIdentity
from wisecli.models.layout.site import find_site, fingerprint
from wisecli.models.loading import Loaded, load_model
from wisecli.progress import ignore_progress
from wisecli.routing.gating.request_gate import DEEP_GATE, REQUEST_GATE

HEADS = "wisecli.editing.router_training.router_heads"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model", "llama")


def change(source: Path, target: Path, changed: Callable[[str, Tensor], Tensor]) -> Path:
    """Write a checkpoint with other tensors."""
    shutil.copytree(source, target)
    tensors = load_tensors(source / "model.safetensors")
    other = {name: changed(name, tensor) for name, tensor in tensors.items()}
    save_tensors(target / "model.safetensors", other, {"format": "pt"})
    return target


def known(model: Path, layer: int | str = 2) -> tuple[Loaded, ReadSites, BaseIdentity]:
    loaded, checkpoint = load_model(model, load=CPU), Checkpoint(model)
    site = find_site(model, checkpoint, layer)
    reader = BackgroundReader(loaded, checkpoint, fingerprint(model, checkpoint, site), EditSettings(), ignore_progress)
    return loaded, read_sites(loaded, site), reader.identity


def test_a_model_is_known_in_half_precision_and_not_once_it_is_tuned(model: Path, tmp_path: Path) -> None:
    plain = known(model)[2]
    half = known(change(model, tmp_path / "half", lambda _, one: one.bfloat16()))[2]
    tuned = known(change(model, tmp_path / "tuned", lambda name, one: one + 0.01 if "proj" in name else one))[2]
    assert half.rounded == plain.rounded
    assert half.exact != plain.exact
    assert tuned.rounded != plain.rounded


@pytest.fixture
def packaged(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, RouterHeads]:
    """A package with heads of the tiny model, and the heads as they were trained."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    loaded, sites, identity = known(model)
    trained = router_heads(loaded, sites, identity, texts=24, batch_size=16, on_progress=ignore_progress)
    directory = tmp_path / "heads"
    directory.mkdir()
    package_heads(directory / "tiny.safetensors", trained, identity, sites)
    return directory, trained


def test_packaged_heads_are_those_that_were_trained(
    model: Path, packaged: tuple[Path, RouterHeads], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, trained = packaged
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    monkeypatch.setattr(f"{HEADS}.train_heads", None)
    monkeypatch.setattr("wisecli.io.packaged_weights.PACKAGED", directory)
    loaded, sites, identity = known(model)
    for _ in range(2):  # of the package, then of the cache
        heads = router_heads(loaded, sites, identity, texts=24, batch_size=16, on_progress=ignore_progress)
        assert heads.tensors().keys() == trained.tensors().keys()
        for name, tensor in trained.tensors().items():
            assert_close(heads.tensors()[name], tensor)


def test_heads_of_other_layers_or_another_template_are_not_taken(
    model: Path, packaged: tuple[Path, RouterHeads]
) -> None:
    directory = packaged[0]
    loaded, sites, identity = known(model)
    other_layers = sites._replace(gate=None, router=sites.router.below(0))
    loaded.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    templated = BaseIdentity.of(Checkpoint(model), "", loaded.tokenizer)
    keys = [heads_key(identity, sites), heads_key(identity, other_layers), heads_key(templated, sites)]
    files = [packaged_file(key, directory) for key in keys]
    assert files == [directory / "tiny.safetensors", None, None]


def test_the_demo_model_needs_to_learn_nothing(real_model: Path) -> None:
    loaded, sites, identity = known(real_model, "auto")
    path = packaged_file(heads_key(identity, sites))
    assert path is not None, f"{PACKAGED} has none of this version: run scripts/package_learned.py"
    heads = load_heads(path, {"heads.unrelated": torch.zeros(1, 576), "heads.text": torch.zeros(1).long()})
    assert heads is not None
    assert heads.request_gate.keys() >= {*REQUEST_GATE, *DEEP_GATE}
    assert heads.proj_weight.shape[-1] == loaded.model.config.hidden_size
