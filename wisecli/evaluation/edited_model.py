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
from wisecli.models.activations import captured
from wisecli.models.loading import load_model
from wisecli.models.streaming import LayerStream
from wisecli.models.tokenization import Batch
from wisecli.routing.ann_index import build_index
from wisecli.routing.meaning import looked_at
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
    def prompts(self, batch: Batch) -> Prompt:
        """What is known of the prompts of a batch, which end in its column ``start``."""
        routed, real = self.routed, batch.mask.bool()
        end = torch.full((len(real), 1), batch.start, device=real.device)
        within = real & (torch.arange(real.shape[1], device=real.device) <= end)
        named = routed.named_in(batch.ids, within)
        sure = letters = None
        if routed.meaning is not None and routed.reads is not None:
            site = self.manifest.site.below(routed.reads)
            (read,) = captured(self.model, site, [batch], stream=self.stream, above=False)
            first = real.long().cumsum(1) == 1
            breaks = routed.meaning.breaks
            sure = routed.meaning(read.hidden, looked_at(batch.ids, within, first, breaks))
            if routed.spelling is not None:
                asked = looked_at(batch.ids, within, torch.zeros_like(within), breaks)
                letters = routed.spelling.read(batch.ids, asked)
        named = None if named is None else named[:, None]
        return routed.with_slips(Prompt(end, named=named, real=real, sure=sure, letters=letters))

    @torch.no_grad()
    def decisions(self, keys: Tensor, end: int, asked: Prompt) -> RoutingDecision:
        """What answers each token of one row, by its keys (n, d_ff); the parts of the decision are (n,).

        ``strength`` and ``nearest`` are those of any memory, also of one whose subject the prompt does not name.

        Args:
            end: the place of the prompt's last token.
            asked: what is known of the prompt.
        """
        prompt = Prompt(torch.tensor([[end]], device=keys.device), sure=asked.sure)
        found = route(self.routed, keys[None], prompt)
        own = None if asked.named is None else route(self.routed, keys[None], replace(prompt, named=asked.named))
        return RoutingDecision(found.strength[0], found.nearest[0], (own or found).chosen[0])


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
