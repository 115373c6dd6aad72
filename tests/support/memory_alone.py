"""A memory as an engine has it, with transformers in the place of the engine's layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from wisecli.io.checkpoint import read_json
from wisecli.vllm_plugin.processes import ALONE, Processes
from wisecli.vllm_plugin.releases import name_of, own_paths
from wisecli.vllm_plugin.served_memory import Edited, ServedMemory


class Reader:
    """Reads windows with the layers of the checkpoint in transformers."""

    before_run = None
    adds_rest = False

    def __init__(self, model: Any) -> None:
        self._decoder = model.get_decoder()

    def read(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """The states of windows, each by itself."""
        with torch.no_grad():
            return [self._decoder.read(one[None], torch.ones_like(one[None]).bool()).states[0] for one in windows]


def served(checkpoint: Path, *, loaded: bool = True, processes: Processes = ALONE) -> tuple[ServedMemory, Any]:
    """The memory of a checkpoint as an engine has it, and the checkpoint in transformers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
    described = read_json(checkpoint / "config.json")["wise"]
    memory = ServedMemory(Edited.of(described), model.config, Reader(model), checkpoint, processes=processes)
    paths = own_paths(described)
    stored = load_file(checkpoint / "model-side-memory.safetensors")
    if loaded:
        memory.load({str(name_of(name, paths)): tensor for name, tensor in stored.items()}, torch.device("cpu"))
    return memory, model
