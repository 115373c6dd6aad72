"""A model with its memory in place, from whichever directory holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wisecli.artifacts.locate import find_base
from wisecli.artifacts.memory_manifest import Manifest
from wisecli.models.loading import load_model
from wisecli.models.streaming import LayerStream
from wisecli.routing.ann_index import build_index
from wisecli.routing.prompt_gate import UNROUTED
from wisecli.routing.side_memory import RoutedMatrix, install, opened


@dataclass(frozen=True)
class Edited:
    """A model whose value matrix is routed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    routed: RoutedMatrix
    manifest: Manifest
    stream: LayerStream | None = None

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The base model for a while: nothing is routed."""
        self.routed.enabled = False
        try:
            yield
        finally:
            self.routed.enabled = True

    @torch.no_grad()
    def decisions(self, keys: Tensor, end: int, named: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """For keys (n, d_ff) of one row: by what factor a threshold is exceeded at most, where, and what answers, (n,).

        Args:
            end: the place of the prompt's last token.
            named: the edits whose subjects the prompt names (1, M), if that has a say in what answers.
        """
        place = torch.arange(len(keys), device=keys.device)
        strength, nearest = self.routed.nearest(keys, place > end)
        chosen = opened(strength, nearest)
        if named is not None:
            chosen = opened(*self.routed.nearest(keys, place > end, named))
        if self.routed.gate is not None:
            chosen = self.routed.follow(chosen[end].expand_as(chosen), chosen).where(place >= end, UNROUTED)
        return strength, nearest, chosen


def attach(
    memory: Path,
    *,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory_budget: int | None = None,
) -> Edited:
    """Load the base model of a memory (or of an exported directory) and put the memory in its place.

    Args:
        memory_budget: about how many bytes there are; of a model that does not fit only the edited layer and those
            above it are held, the others are read as they run.

    Raises:
        WiseError: either cannot be read, or they do not belong together.
    """
    directory, manifest = find_base(memory, model)
    site = manifest.site
    given = {"device": device, "dtype": dtype, "layers": site.layer_module.rpartition(".")[0]}
    loaded = load_model(directory, **given, trust_remote_code=trust_remote_code, memory_budget=memory_budget)
    if loaded.stream is not None:
        loaded.stream.hold(range(site.layer, len(loaded.stream.layers)))
    routed = install(loaded.model, site.module, manifest.memory, transposed=site.transposed)
    routed.to(loaded.device)
    routed.index = build_index(routed)
    return Edited(loaded.model, loaded.tokenizer, routed, manifest, loaded.stream)
