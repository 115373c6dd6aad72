"""Normed states behind the edited layer, of all tokens of many texts, held in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wisecli.export.stock.router.relation_reader import Rotation
from wisecli.io.digest import sha256_json
from wisecli.io.user_cache import cache_path
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.chat_template import template_digest
from wisecli.models.prompts.tokenization import Row, collate, in_batches
from wisecli.models.running.activations import captured, layers_of
from wisecli.progress import Event, ProgressCallback


@dataclass(frozen=True)
class LateStates:
    """The ``normed`` states (n, d) of all tokens of texts, text after text, in half precision.

    ``inverse`` (n,) is what the norm multiplied each by, ``first`` (B + 1,) says where each text begins.
    """

    normed: Tensor
    inverse: Tensor
    first: Tensor

    def packed(self, texts: Tensor | list[int], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states (n, d) in single precision, and their factors (n,), of the tokens of texts (B,) that there
        are by a mask (B, T), text after text.
        """
        index = (self.first[texts][:, None] + torch.arange(mask.shape[1]))[mask]
        return self.normed[index].float(), self.inverse[index]

    def of(self, text: int) -> slice:
        """Return where the tokens of one text are."""
        return slice(int(self.first[text]), int(self.first[text + 1]))


def late_states(
    loaded: Loaded,
    site: Site,
    texts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    on_progress: ProgressCallback,
    stage: str,
) -> LateStates:
    """Return what leaves the edited layer at all tokens of texts."""
    rows = [Row(tuple(tokens), ()) for tokens in texts]
    groups = list(in_batches(rows, batch_size, by_beginning=True))
    batches = (collate([rows[index] for index in indices]).to(loaded.device) for indices in groups)
    first = torch.tensor([0, *map(len, texts)]).cumsum(0)
    normed = torch.empty(int(first[-1]), site.d, dtype=torch.float16)
    inverse, epsilon, done = torch.empty(len(normed)), float(loaded.model.config.rms_norm_eps), 0
    read = captured(loaded.model, site, batches, stream=loaded.stream, above=False, shared=True)
    for indices, activations in zip(groups, read, strict=True):
        factors = torch.rsqrt(activations.hidden.float().square().mean(-1, keepdim=True) + epsilon)
        states, mask = activations.hidden.float() * factors, activations.batch.mask.bool()
        for place, index in enumerate(indices):
            own = slice(int(first[index]), int(first[index + 1]))
            normed[own] = states[place, mask[place]].half().cpu()
            inverse[own] = factors[place, mask[place], 0].cpu()
        done += len(indices)
        on_progress(Event(stage, done, len(rows)))
    return LateStates(normed, inverse, first)


def cache_file(loaded: Loaded, site: Site, *about: object) -> Path:
    """Return where the cache keeps what was made of a base model's states behind the edited layer.

    Args:
        about: what else it depends on, such as the model's identity, as JSON.
    """
    known = [*about, site.as_dict(), str(loaded.model.dtype), template_digest(loaded.tokenizer)]
    return cache_path("gate") / f"{sha256_json(known)[:32]}.safetensors"


def rotation_of(loaded: Loaded, site: Site, length: int) -> Rotation:
    """Return how a model's attention behind the edited layer rotates so many tokens, and scales scores."""
    rotary = loaded.model.get_submodule(f"{site.layer_module.rpartition('.')[0].rpartition('.')[0]}.rotary_emb")
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    attention: Any = layers_of(loaded.model, site)[site.layer].self_attn
    return Rotation(cos[0].float(), sin[0].float(), float(attention.scaling))
