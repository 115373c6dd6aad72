import pytest
import torch
from support.helpers import memory_for, site_of
from support.tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedModel

from wisecli.models.layout.site import MatrixSite
from wisecli.routing.layers.routed_layer import RoutedMatrix
from wisecli.routing.memories.side_memory import SideMemory
from wisecli.routing.passes.engine_checks import LostMemoryError, require_memory, require_transformers


def edited(architecture: str = "llama", kind: str = "lookup") -> tuple[PreTrainedModel, MatrixSite, RoutedMatrix]:
    """A tiny model with a memory."""
    model = tiny_model(architecture)
    site = site_of(model, 2)
    memory = memory_for(model, site, kind=kind, memories=3)
    return model, site, site.install(model, memory)


def test_a_memory_that_is_in_a_model_is_found_in_every_architecture(architecture: str) -> None:
    model, site, _ = edited(architecture)
    require_memory(model, site.module)


@pytest.mark.parametrize("kind", ["matrix", "lookup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_of_every_kind_is_found(kind: str, dtype: torch.dtype) -> None:
    model, site, _ = edited("gpt2", kind)
    require_memory(model.to(dtype), site.module)


def test_a_matrix_in_its_place_is_missed() -> None:
    model, site, routed = edited()
    parent, _, name = site.module.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Linear(routed.weight.shape[1], routed.weight.shape[0], bias=False))
    with pytest.raises(LostMemoryError, match=f"the edits are lost: Linear was put in the place of {site.module}"):
        require_memory(model, site.module)


@pytest.mark.parametrize("kind", ["matrix", "lookup"])
def test_a_memory_that_was_allocated_and_never_loaded_is_told(kind: str) -> None:
    model, site = tiny_model("llama"), site_of(tiny_model("llama"), 2)
    described = memory_for(model, site, kind=kind, memories=2).describe()
    site.install(model, SideMemory.from_description(described))
    with pytest.raises(LostMemoryError, match=f"the memory of {site.module} was not loaded"):
        require_memory(model, site.module)
    require_memory(model.to("meta"), site.module)


def test_engines_are_refused_by_the_name_of_their_attention() -> None:
    for attention in (None, "sdpa", "eager", "flash_attention_2", "flex_attention"):
        require_transformers(attention)
    for attention, engine in {"vllm": "vLLM", "vllm_v1": "vLLM", "sglang": "SGLang", "tgi": "TGI"}.items():
        with pytest.raises(LostMemoryError, match=rf"{engine} packs .*`wise export --format stock`"):
            require_transformers(attention)
