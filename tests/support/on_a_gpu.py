"""Run by the Python of an environment that has vLLM: what vLLM does with an edited model on a GPU alone.

It prints, as JSON: what vLLM cuts piecewise graphs at, without edits and with them; how often the operator that adds
residuals ends a graph that is recorded while it runs; whether what goes into the edited layer may be of eight bits,
before and after residuals are put there; whether queries may, before windows are read, then and afterwards; and how far
what windows attend to lies off if little of it may be in memory at once.
"""

import json
import os
import sys
from types import SimpleNamespace

os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"  # vLLM reads it when it is imported

import torch
from vllm.compilation import breakable_cudagraph
from vllm.config import CompilationConfig, CompilationMode
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from wisecli.vllm_plugin import residual_hooks, windows
from wisecli.vllm_plugin.engine_names import LAYER
from wisecli.vllm_plugin.registration import _stay_out_of_graphs
from wisecli.vllm_plugin.windows import WindowAttention, whole_queries


def cuts(*, edited, partition):
    compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, use_inductor_graph_partition=partition)
    if edited:
        _stay_out_of_graphs(compilation)
    compilation.set_splitting_ops_for_v1("naive")
    return compilation.splitting_ops


class Recorded:
    """Stands in for a graph that is being recorded, which needs a GPU."""

    _capturing = True

    def __init__(self):
        self.breaks = 0

    def add_eager(self, call):
        self.breaks += 1
        return call()


def breaks():
    """How often the operator ends a graph that is recorded, and what it was told to add to."""
    added, recorded = [], Recorded()
    memory = SimpleNamespace(cut=False, add_to=lambda answer, _keys, **_real: added.append(list(answer.shape)))
    context = SimpleNamespace(no_compile_layers={LAYER: memory}, attn_metadata={}, cudagraph_runtime_mode=None)
    breakable_cudagraph.weak_ref_tensor = lambda tensor: tensor
    breakable_cudagraph.BreakableCUDAGraphCapture._tls.active = recorded
    with override_forward_context(context):
        torch.ops.wise.add_residuals(torch.zeros(3, 4), torch.zeros(3, 8), None, LAYER)
    return recorded.breaks, added


class Method(QuantizeMethodBase):
    def create_weights(self, layer, *args, **kwargs): ...

    def apply(self, layer, *args, **kwargs): ...


def eight_bits():
    layer = torch.nn.Module()
    layer.quant_method, layer._input_quant_key = Method(), "eight bits"
    before = get_input_quant_key(layer)
    residual_hooks.put(torch.nn.ModuleDict({"down": layer}), "down", behind=False)
    return before, get_input_quant_key(layer)


def queries():
    layer, found = torch.nn.Module(), []
    layer.query_quant = torch.nn.Identity()
    found.append(layer.query_quant is not None)
    with whole_queries(layer), whole_queries(torch.nn.Module()):
        found.append(layer.query_quant is not None)
    return [*found, isinstance(dict(layer.named_children())["query_quant"], torch.nn.Identity)]


def attended(at_once):
    windows._LOGITS, lengths, shape = at_once, [3, 9, 1, 7], (20, 4, 8)
    torch.manual_seed(0)
    layer = SimpleNamespace(impl=SimpleNamespace(scale=0.3), sliding_window=4)
    query, key, value = torch.randn(3, *shape).unbind()
    return WindowAttention(layer, lengths).forward(layer, query, key, value, output=torch.empty(shape))


if __name__ == "__main__":
    partitions = {str(one): [cuts(edited=edited, partition=one) for edited in (False, True)] for one in (False, True)}
    told = {"cuts": partitions, "breaks": breaks(), "eight bits": eight_bits(), "queries": queries()}
    told["off"] = float((attended(1) - attended(2**20)).abs().max())
    sys.stdout.write(json.dumps(told))
