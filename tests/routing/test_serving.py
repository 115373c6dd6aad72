from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import memory_for, random_rows, site_of, whitening_of
from support.tiny_models import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from wisecli.models.site import Site
from wisecli.routing.serving import (
    LostMemoryError,
    Served,
    engine_of,
    own_keys,
    require_decision_per_token,
    require_memory,
    set_apart,
)
from wisecli.routing.side_memory import RoutedMatrix, install

KINDS = [("matrix", "norm", 1), ("matrix", "norm", 2), ("matrix", "key", 1), ("matrix", "key", 3), ("lookup", "key", 4)]
LAYER = 2


def edited(
    architecture: str = "llama", kind: str = "lookup", router: str = "key", memories: int = 4, **named: Any
) -> tuple[PreTrainedModel, Site, RoutedMatrix]:
    """A tiny model with a memory, as exported code builds it."""
    model = tiny_model(architecture)
    site = site_of(model, LAYER)
    given = {"routing": "token", **named}
    memory = memory_for(model, site, router=router, memories=memories, kind=kind, **given)
    routed = install(model, site.module, memory, transposed=site.transposed)
    set_apart(model, site.module)
    return model, site, routed


def block_of(model: PreTrainedModel, site: Site) -> nn.Module:
    return model.get_submodule(site.module.rpartition(".")[0])


def test_a_memory_that_is_in_a_model_is_found_in_every_architecture(architecture: str) -> None:
    model, site, _ = edited(architecture)
    require_memory(model, site.module)


@pytest.mark.parametrize(("kind", "router", "memories"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_of_every_kind_is_found(kind: str, router: str, memories: int, dtype: torch.dtype) -> None:
    model, site, routed = edited("gpt2", kind, router, memories)
    require_memory(model.to(dtype), site.module)
    assert len(own_keys(routed)) > 0


@pytest.mark.parametrize("threshold", [1e-6, 1e6])
def test_it_is_found_whether_its_keys_open_it_by_themselves_or_not(threshold: float) -> None:
    model, site, routed = edited()
    routed.thresholds = (threshold,) * len(routed.thresholds)
    require_memory(model, site.module)


def test_keys_are_those_that_were_stored() -> None:
    _, _, routed = edited()
    keys = own_keys(routed)
    step = len(routed.probes) // len(keys)
    tensors = dict(routed.named_buffers())
    # A stored key e is kept as `P e / √(eᵀP e)`: with itself it has a cosine of 1, the largest that there is.
    for key, probe, metric in zip(keys, routed.probes[::step], routed.metric[::step].tolist(), strict=True):
        length = (key @ whitening_of(tensors, metric) @ key).sqrt()
        assert torch.isclose(probe @ key / length, torch.tensor(1.0), atol=1e-4)


def a_layer_in_its_place(model: PreTrainedModel, site: Site, _: RoutedMatrix) -> None:
    block_of(model, site).down_proj = nn.Linear(site.d_ff, site.d, bias=False)


def a_layer_with_the_same_sizes(model: PreTrainedModel, site: Site, routed: RoutedMatrix) -> None:
    layer = nn.Linear(site.d_ff, site.d, bias=False)
    layer.weight = nn.Parameter(routed.weight)
    routed.in_features, routed.out_features = site.d_ff, site.d
    block_of(model, site).down_proj = layer


def none_in_its_place(model: PreTrainedModel, site: Site, _: RoutedMatrix) -> None:
    del block_of(model, site).down_proj


def a_block_that_passes_it_by(model: PreTrainedModel, site: Site, routed: RoutedMatrix) -> None:
    block: Any = block_of(model, site)
    block.forward = lambda x: nn.functional.linear(block.act_fn(block.gate_proj(x)) * block.up_proj(x), routed.weight)


def a_block_that_is_split(model: PreTrainedModel, site: Site, _: RoutedMatrix) -> None:
    block: Any = block_of(model, site)
    for name in ("gate_proj", "up_proj"):
        setattr(block, name, nn.Linear(site.d, site.d_ff // 2, bias=False))


def a_memory_that_was_not_loaded(_model: PreTrainedModel, _site: Site, routed: RoutedMatrix) -> None:
    routed.probes.fill_(torch.nan)


def values_that_were_not_loaded(_model: PreTrainedModel, _site: Site, routed: RoutedMatrix) -> None:
    routed.values.fill_(torch.nan)


def a_matrix_that_adds_nothing(_model: PreTrainedModel, _site: Site, routed: RoutedMatrix) -> None:
    routed.forward = lambda keys, **_: nn.functional.linear(keys, routed.weight)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        (a_layer_in_its_place, r"Linear was put in the place of model\.layers\.2\.mlp\.down_proj"),
        (a_layer_with_the_same_sizes, "Linear was put in the place"),
        (none_in_its_place, "EditedLlamaMLP has no down_proj"),
        (a_block_that_passes_it_by, "EditedLlamaMLP does not ask model"),
        (a_block_that_is_split, "given 32 of the 64 numbers of a key, as if it were split"),
        (a_memory_that_was_not_loaded, "was not loaded"),
        (values_that_were_not_loaded, "does not find itself"),
        (a_matrix_that_adds_nothing, "does not find itself"),
    ],
)
def test_no_way_of_losing_it_is_silent(lose: Callable[[Any, Any, Any], None], said: str) -> None:
    model, site, routed = edited()
    lose(model, site, routed)
    with pytest.raises(LostMemoryError, match=f"the edits are lost: .*{said}"):
        require_memory(model, site.module)


def test_a_layer_on_another_machine_is_not_missed() -> None:
    model, site, _ = edited()
    model.model.layers[LAYER] = type("PPMissingLayer", (nn.Identity,), {})()
    require_memory(model, site.module)


def test_weights_that_are_not_in_memory_are_not_asked() -> None:
    model, site, _ = edited()
    require_memory(model.to("meta"), site.module)


class Engine(Served):
    """What exported code makes of a decoder."""

    def __init__(self, model: nn.Module, module: str, engine: str | None) -> None:
        super().__init__()
        self.model = model
        self.wise_module, self.wise_engine = f"model.{module}", engine


@pytest.mark.parametrize("engine", [None, "vLLM"])
def test_a_model_checks_itself_when_an_engine_has_loaded_it(engine: str | None) -> None:
    model, site, routed = edited()
    served = Engine(model, site.module, engine)
    assert served.eval() is served
    a_matrix_that_adds_nothing(model, site, routed)
    assert served.train() is served
    if engine is None:
        served.eval()
    else:
        with pytest.raises(LostMemoryError):
            served.eval()


def test_the_block_around_the_matrix_has_a_type_of_its_own_and_computes_the_same() -> None:
    model, site, _ = edited()
    kinds = [type(layer.mlp) for layer in model.model.layers]
    assert [kind.__name__ for kind in kinds].count("LlamaMLP") == len(kinds) - 1
    assert kinds[LAYER].__bases__ == (kinds[0],)
    assert kinds[LAYER].forward is kinds[0].forward
    assert type(block_of(edited()[0], site)) is kinds[LAYER]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_is_still_copied_and_pickled(again: Callable[[Any], Any]) -> None:
    model, _, _ = edited()
    ids = torch.tensor([random_rows((6, 1))[0].prompt])

    def logits(of: Any) -> Tensor:
        found: Tensor = of(ids).logits
        return found

    with torch.no_grad():
        assert torch.equal(logits(again(model)), logits(model))


def test_engines_are_known_by_their_attention() -> None:
    named = (None, "eager", "sdpa", "flash_attention_2", "paged|sdpa", "vllm", "vllm_mla", "sglang", "tgi")
    assert [engine_of(name) for name in named] == [None] * 5 + ["vLLM", "vLLM", "SGLang", "TGI"]


def test_what_prompts_decide_is_refused_where_they_are_packed() -> None:
    require_decision_per_token("token", "vLLM")
    require_decision_per_token("sequence", None)
    with pytest.raises(LostMemoryError, match=r"vLLM packs .* `wise merge --routing token`"):
        require_decision_per_token("sequence", "vLLM")
