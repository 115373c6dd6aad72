import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import rewrite
from support.thorough import few
from support.tiny_models import TINY_CONFIGS, tiny_model
from torch import Tensor

from wisecli.errors import ModelError, SettingsError, UnknownArchitectureError
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import architectures, stored_weight
from wisecli.models.layout.site import Fingerprint, MatrixSite, find_site, fingerprint

LAYERS = 5
# Checkpoints of the others keep their layers under another path than the model anyway.
PLAIN = sorted(name for name, row in architectures().items() if "stored" not in row)


def stored_otherwise(directory: Path, own: str, other: str) -> None:
    """Rename tensors whose names start with a path."""
    tensors = load_file(directory / "model.safetensors")
    change_tensors(directory, {re.sub(f"^{re.escape(own)}", other, name): one for name, one in tensors.items()})


def saved(directory: Path, architecture: str = "llama") -> Path:
    tiny_model(architecture).save_pretrained(directory)
    return directory


def change_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def identity(directory: Path, layer: str | int = 2) -> Fingerprint:
    checkpoint = Checkpoint(directory)
    return fingerprint(directory, checkpoint, find_site(directory, checkpoint, layer))


def only_config(directory: Path, layers: int) -> Path:
    """A llama of so many layers, with the value matrices alone."""
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
    change_tensors(directory, {f"model.layers.{i}.mlp.down_proj.weight": torch.zeros(2, 3) for i in range(layers)})
    return directory


EVERY = pytest.mark.parametrize("architecture", sorted(TINY_CONFIGS))


def test_every_architecture_of_the_table_is_tried_here() -> None:
    assert set(architectures()) == set(TINY_CONFIGS)


@EVERY
@pytest.mark.parametrize("layer", few([0, 2, "3"], ["3"]))
def test_the_site_is_the_matrix_whose_output_joins_the_residual_stream(
    tmp_path: Path, architecture: str, layer: int | str
) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    site = find_site(tmp_path, checkpoint, layer)
    matrix = site.matrix(checkpoint)
    module = site.watched(model)
    assert (site.architecture, site.layer) == (architecture, int(layer))
    assert matrix.shape == (site.d, site.d_ff) == (32, 128 if architecture.startswith("gpt") else 64)
    weight = module.get_parameter("weight")
    assert torch.equal(matrix, weight.T if site.transposed else weight)

    # Adding to the module's output must add the same to the layer's, or what the norm makes of it.
    shift = torch.randn(site.d, generator=torch.Generator().manual_seed(0))
    outputs: list[Tensor] = []
    keys: list[tuple[Tensor, Tensor]] = []
    layer_module = model.get_submodule(site.layer_module)
    ids = torch.arange(8)[None]
    layer_module.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    hook = module.register_forward_hook(lambda _module, inputs, output: keys.append((inputs[0], output.clone())))
    with torch.no_grad():
        model(ids)
        hook.remove()
        module.register_forward_hook(lambda _module, _inputs, output: output + shift)
        model(ids)
    before, after = (output.reshape(-1, site.d) for output in outputs)
    ((key, value),) = keys
    norm = model.get_submodule(site.norm) if site.norm else torch.nn.Identity()
    with torch.no_grad():
        joined = norm(value + shift) - norm(value)
    assert torch.allclose(after - before, site.multiplier * joined.reshape(-1, site.d), atol=1e-4)

    # And the matrix must turn the module's input into its output.
    bias = getattr(module, "bias", None)
    expected = key @ matrix.T + (0 if bias is None else bias)
    assert torch.allclose(value, expected, atol=1e-4)


@EVERY
def test_only_gpt2_keeps_the_matrix_turned(tmp_path: Path, architecture: str) -> None:
    site = find_site(saved(tmp_path, architecture), Checkpoint(tmp_path), 1)
    assert site.transposed is (architecture == "gpt2")
    checkpoint = Checkpoint(tmp_path)
    stored = stored_weight(checkpoint, site.module)
    assert stored is not None
    assert checkpoint.shape(stored) == ((site.d_ff, site.d) if site.transposed else (site.d, site.d_ff))


@EVERY
def test_the_weights_name_is_the_modules(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    site = find_site(tmp_path, Checkpoint(tmp_path), 1)
    assert site.weight in dict(model.named_parameters())
    assert site.module.startswith(f"{site.layer_module}.")
    assert site.layer_module.endswith(".1")


@pytest.mark.parametrize("architecture", PLAIN)
def test_a_checkpoint_without_the_base_models_prefix_has_the_same_site(tmp_path: Path, architecture: str) -> None:
    saved(tmp_path, architecture)
    checkpoint = Checkpoint(tmp_path)
    site = find_site(tmp_path, checkpoint, 2)
    matrix, before = site.matrix(checkpoint), fingerprint(tmp_path, checkpoint, site)
    prefix = site.weight.split(".", 1)[0] + "."
    tensors = load_file(tmp_path / "model.safetensors")
    change_tensors(tmp_path, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    bare = Checkpoint(tmp_path)
    assert site.weight not in bare
    assert find_site(tmp_path, bare, 2) == site
    assert torch.equal(site.matrix(bare), matrix)
    assert fingerprint(tmp_path, bare, site) == before


@pytest.mark.parametrize(("layers", "chosen"), [(30, 24), (32, 26), (12, 10), (16, 13), (48, 38)])
def test_auto_is_the_layer_at_four_fifths_of_the_depth(tmp_path: Path, layers: int, chosen: int) -> None:
    checkpoint = Checkpoint(only_config(tmp_path, layers))
    assert find_site(tmp_path, checkpoint).layer == chosen


@pytest.mark.parametrize("layers", [2, 3, 4, 5, 6, 7, 8, 30])
def test_auto_is_a_layer_that_can_also_be_named(tmp_path: Path, layers: int) -> None:
    checkpoint = Checkpoint(only_config(tmp_path, layers))
    automatic = find_site(tmp_path, checkpoint, "auto")
    assert find_site(tmp_path, checkpoint, automatic.layer) == automatic


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        *(
            (layer, f"--layer {layer} is out of range: choose 0 to {LAYERS - 2}")
            for layer in (-1, "-1", LAYERS - 1, LAYERS, "99")
        ),
        *((layer, "--layer must be `auto` or a number") for layer in ("last", "", "2.5", "Auto")),
    ],
)
def test_a_layer_out_of_range_or_without_a_number_is_refused(tmp_path: Path, layer: int | str, says: str) -> None:
    saved(tmp_path)
    with pytest.raises(SettingsError, match=says):
        find_site(tmp_path, Checkpoint(tmp_path), layer)


@pytest.mark.parametrize("layers", [0, 1])
def test_a_model_without_a_layer_above_is_refused(tmp_path: Path, layers: int) -> None:
    with pytest.raises(ModelError, match="fewer than two layers"):
        find_site(tmp_path, Checkpoint(only_config(tmp_path, layers)))


@pytest.mark.parametrize("model_type", ["bert", "", None, 5])
def test_an_unknown_architecture_is_refused_with_those_known(tmp_path: Path, model_type: object) -> None:
    saved(tmp_path)
    rewrite(tmp_path / "config.json", model_type=model_type)
    with pytest.raises(UnknownArchitectureError) as caught:
        find_site(tmp_path, Checkpoint(tmp_path))
    assert repr(str(model_type)) in str(caught.value)
    assert all(name in str(caught.value) for name in TINY_CONFIGS)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    change_tensors(tmp_path, {"something.else": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        find_site(tmp_path, Checkpoint(tmp_path), 2)


def test_a_site_survives_its_json_form(tmp_path: Path, architecture: str) -> None:
    site = find_site(saved(tmp_path, architecture), Checkpoint(tmp_path), 1)
    assert MatrixSite(**json.loads(json.dumps(site.as_dict()))) == site


def test_a_model_saved_twice_has_the_same_fingerprint(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert identity(saved(tmp_path / "a", architecture)) == identity(saved(tmp_path / "b", architecture))


@pytest.mark.parametrize(
    ("place", "matrix_changes"),
    [
        ("model.layers.2.mlp.down_proj.weight", True),
        ("model.layers.1.mlp.down_proj.weight", False),
        ("model.layers.2.mlp.up_proj.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_the_fingerprint_changes_with_one_entry_of_the_edited_matrix_only(
    tmp_path: Path, place: str, *, matrix_changes: bool
) -> None:
    before = identity(saved(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[place][-1, -1] += 1e-3
    change_tensors(tmp_path, tensors)
    after = identity(tmp_path)
    assert (after.matrix != before.matrix) is matrix_changes
    assert after.config == before.config


@pytest.mark.parametrize(
    ("values", "config_changes"),
    [
        ({"rms_norm_eps": 1e-3}, True),
        ({"num_attention_heads": 8}, True),
        ({"something_new": 1}, True),
        ({"transformers_version": "0.0.0"}, False),
        ({"_name_or_path": "elsewhere"}, False),
        ({"dtype": "float16"}, False),
        ({"torch_dtype": "float16"}, False),
        ({}, False),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else None,
)
def test_the_fingerprint_changes_with_the_settings_that_matter(
    tmp_path: Path, values: dict[str, object], *, config_changes: bool
) -> None:
    before = identity(saved(tmp_path))
    rewrite(tmp_path / "config.json", **values)
    after = identity(tmp_path)
    assert (after.config != before.config) is config_changes
    assert after.matrix == before.matrix


def test_layers_have_different_fingerprints(tmp_path: Path) -> None:
    saved(tmp_path)
    assert len({identity(tmp_path, layer).matrix for layer in range(LAYERS - 1)}) == LAYERS - 1


@pytest.mark.parametrize("architecture", sorted(set(TINY_CONFIGS) - set(PLAIN)))
def test_layers_that_are_stored_under_the_models_own_path_are_the_same_site(tmp_path: Path, architecture: str) -> None:
    row = architectures()[architecture]
    saved(tmp_path, architecture)
    checkpoint = Checkpoint(tmp_path)
    site = find_site(tmp_path, checkpoint, 2)
    before = fingerprint(tmp_path, checkpoint, site)
    assert site.weight not in checkpoint
    stored_otherwise(tmp_path, row["stored"], row["layers"])
    renamed = Checkpoint(tmp_path)
    assert site.weight in renamed
    assert find_site(tmp_path, renamed, 2) == site
    assert fingerprint(tmp_path, renamed, site) == before
