"""A model with its memory in place, from whichever directory holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wisecli.artifacts.locate import find_base
from wisecli.artifacts.memory_manifest import Manifest
from wisecli.config import LoadOptions
from wisecli.models.loading import load_model
from wisecli.models.streaming import LayerStream
from wisecli.routing.ann_index import build_index
from wisecli.routing.prompt_gate import Prompt
from wisecli.routing.router import RoutingDecision, route
from wisecli.routing.side_memory import RoutedMatrix, install


@dataclass(frozen=True)
class EditedModel:
    """A model whose value matrix is routed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    routed: RoutedMatrix
    manifest: Manifest
    stream: LayerStream | None = None

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The base model for a while: nothing is routed."""
        with self.routed.called_with(off=True):
            yield

    @torch.no_grad()
    def decisions(self, keys: Tensor, end: int, named: Tensor | None) -> RoutingDecision:
        """What answers each token of one row, by its keys (n, d_ff); the parts of the decision are (n,).

        ``strength`` and ``nearest`` are those of any memory, also of one whose subject the prompt does not name.

        Args:
            end: the place of the prompt's last token.
            named: the edits whose subjects the prompt names (1, M), if that has a say in what answers.
        """
        prompt = Prompt(torch.tensor([[end]], device=keys.device))
        found = route(self.routed, keys[None], prompt)
        asked = None if named is None else route(self.routed, keys[None], replace(prompt, named=named[:, None]))
        return RoutingDecision(found.strength[0], found.nearest[0], (asked or found).chosen[0])


def attach(
    memory: Path,
    *,
    model: str | None = None,
    load: LoadOptions = LoadOptions(),
) -> EditedModel:
    """Load the base model of a memory (or of an exported directory) and put the memory in its place.

    Args:
        load: of a model that does not fit into its ``memory_budget`` only the edited layer and those above it are
            held, the others are read as they run. The revision is the one that the memory names.

    Raises:
        WiseError: either cannot be read, or they do not belong together.
    """
    directory, manifest = find_base(memory, model)
    site = manifest.site
    loaded = load_model(directory, load, layers=site.layer_module.rpartition(".")[0])
    if loaded.stream is not None:
        loaded.stream.hold(range(site.layer, len(loaded.stream.layers)))
    routed = install(loaded.model, site.module, manifest.memory, transposed=site.transposed)
    routed.to(loaded.device)
    routed.index = build_index(routed)
    return EditedModel(loaded.model, loaded.tokenizer, routed, manifest, loaded.stream)
