"""A model with its memory in place, from whichever directory holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wisecli.errors import ModelError
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.safe_paths import inside
from wisecli.manifest import MANIFEST_NAME, Manifest, read_memory
from wisecli.models.loading import is_exported, load_model, require_base
from wisecli.models.resolve import find_model
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


def find_base(memory: Path, model: str | None) -> tuple[Path, Manifest]:
    """The base model's directory and the manifest of a memory, or of an exported directory.

    Raises:
        WiseError: either cannot be read, or they do not belong together.
    """
    manifest = read_memory(memory)
    exported = is_exported(memory)
    directory = (
        memory if exported and model is None else find_model(model or manifest.model, revision=manifest.revision)
    )
    checkpoint = Checkpoint(directory)
    if directory == memory:
        for path in checkpoint.files:
            inside(directory, path.name)
    require_base(directory, checkpoint, manifest.site, manifest.fingerprint)
    return directory, manifest


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


def locate_memory(model: str | None, memory: Path | None, fallback: Path) -> tuple[Path, str | None]:
    """Which directory holds the memory, and which model it is for, from what the command line gave.

    A model that is an exported directory holds its own memory.

    Raises:
        ModelError: there is no memory to be found.
    """
    if memory is not None:
        return memory, model
    if model is not None and (Path(model) / MANIFEST_NAME).is_file():
        return Path(model), None
    if (fallback / MANIFEST_NAME).is_file():
        return fallback, model
    raise ModelError(f"there is no memory in {fallback}; run `wise merge` first or pass --memory")
