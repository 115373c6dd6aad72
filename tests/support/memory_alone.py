"""A memory as an engine has it, with transformers in the place of the engine's layers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from wisecli.io.checkpoint import read_json
from wisecli.routing.deciding.decision import Decision
from wisecli.vllm_plugin.processes import ALONE, Processes
from wisecli.vllm_plugin.releases import name_of, own_paths
from wisecli.vllm_plugin.served_memory import Edited, ServedMemory, Take


class Reader:
    """Reads windows with the layers of the checkpoint in transformers."""

    before_run = None
    adds_rest = False

    def __init__(self, model: Any, read: Sequence[int]) -> None:
        self._decoder, self._read = model.get_decoder(), read

    def parts(self, lengths: Sequence[int]) -> Iterator[slice]:
        """All windows at once."""
        yield slice(0, len(lengths))

    def run(self, windows: Sequence[Tensor], take: Take) -> Decision:
        """Decide by the states of windows, each run by itself through all layers."""
        layers = [self._decoder.layers[number] for number in self._read]
        found: list[list[Tensor]] = [[] for _ in layers or "k"]
        with torch.no_grad(), self._decoder.memory.called_with(off=True), ExitStack() as hooks:
            for number, layer in enumerate(layers):
                hooks.callback(layer.register_forward_hook(partial(_keep, found[number], False)).remove)
            if not layers:
                routed = self._decoder.get_submodule(self._decoder.wise_routed)
                hooks.callback(routed.register_forward_hook(partial(_keep, found[0], True)).remove)
            for one in windows:
                self._decoder(one[None])
        return next(decision for states in found if (decision := take(states)) is not None)


def _keep(kept: list[Tensor], of_input: bool, _module: Any, inputs: tuple[Any, ...], output: Any) -> None:
    state = inputs[0] if of_input else output
    kept.append((state[0] if isinstance(state, tuple) else state)[0])


def served(checkpoint: Path, *, loaded: bool = True, processes: Processes = ALONE) -> tuple[ServedMemory, Any]:
    """The memory of a checkpoint as an engine has it, and the checkpoint in transformers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
    described = read_json(checkpoint / "config.json")["wise"]
    edited = Edited.of(described)
    memory = ServedMemory(edited, model.config, Reader(model, edited.read), checkpoint, processes=processes)
    paths = own_paths(described)
    stored = load_file(checkpoint / "model-side-memory.safetensors")
    if loaded:
        memory.load({str(name_of(name, paths)): tensor for name, tensor in stored.items()}, torch.device("cpu"))
    return memory, model
