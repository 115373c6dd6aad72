"""Normed states behind the router's layer and behind the last one, of all tokens of many texts, in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wisecli.io.digest import sha256_json
from wisecli.io.user_cache import cache_path
from wisecli.models.layout.site import LayerSite, Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.chat_template import template_digest
from wisecli.models.prompts.tokenization import Row, collate, in_batches
from wisecli.models.running.activations import captured, layers_of
from wisecli.progress import Event, ProgressCallback


class Rotation(NamedTuple):
    """Cosines and sines (T, head_dim) by which a model rotates queries and keys, and what it scales scores by."""

    cos: Tensor
    sin: Tensor
    scaling: float


@dataclass(frozen=True)
class TextStates:
    """The ``normed`` states (n, d) of all tokens of texts, text after text, in half precision.

    ``inverse`` (n,) is what the norm multiplied each by, ``first`` (B + 1,) says where each text begins.
    """

    normed: Tensor
    inverse: Tensor
    first: Tensor

    def packed(self, texts: Tensor | list[int], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states (n, d), in float32, and factors (n,) of texts' (B,) tokens by a mask (B, T), end to end."""
        return self.at((self.first[texts][:, None] + torch.arange(mask.shape[1]))[mask])

    def at(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states (n, d) in single precision, and their factors (n,), of tokens (n,) by number."""
        return self.normed[tokens].float(), self.inverse[tokens]

    @classmethod
    def empty(cls, texts: Sequence[Sequence[int]], hidden: int) -> TextStates:
        """Return states of texts that are still to be put in."""
        first = torch.tensor([0, *map(len, texts)]).cumsum(0)
        return cls(torch.empty(int(first[-1]), hidden, dtype=torch.float16), torch.empty(int(first[-1])), first)

    def put(self, text: int, hidden: Tensor, epsilon: float) -> None:
        """Put in the states (T, d) of one text, normed."""
        normed, factors = _normed(hidden, epsilon)
        self.normed[self.of(text)] = normed.half().cpu()
        self.inverse[self.of(text)] = factors.cpu()

    def of(self, text: int) -> slice:
        """Return where the tokens of one text are."""
        return slice(int(self.first[text]), int(self.first[text + 1]))


@dataclass(frozen=True)
class StateCapture:
    """Reads texts, ``batch_size`` side by side, with a model; a router reads the layer at ``site``."""

    loaded: Loaded
    site: Site
    on_progress: ProgressCallback
    batch_size: int = 32

    @property
    def epsilon(self) -> float:
        """What the model's norms add to the mean square."""
        return float(self.loaded.model.config.rms_norm_eps)

    def cache_file(self, *about: object) -> Path:
        """Return where the cache keeps what was made of the states.

        Args:
            about: what else it depends on, such as the model's identity, as JSON.
        """
        known = [*about, self.site.as_dict(), str(self.loaded.model.dtype), template_digest(self.loaded.tokenizer)]
        return cache_path("gate") / f"{sha256_json(known)[:32]}.safetensors"

    def text_states(self, texts: Sequence[Sequence[int]], stage: str) -> TextStates:
        """Return what leaves the router's layer at all tokens of texts."""
        states = TextStates.empty(texts, self.site.d)
        for index, hidden, _ in self._read(self.site, texts, stage):
            states.put(index, hidden, self.epsilon)
        return states

    def router_and_last(self, texts: Sequence[Sequence[int]], stage: str) -> tuple[TextStates, TextStates]:
        """Return what leaves the router's layer, and what leaves the last one, at all tokens of texts."""
        at_router, last = (TextStates.empty(texts, self.site.d) for _ in range(2))
        self.put_both(at_router, last, texts, range(len(texts)), stage)
        return at_router, last

    def put_both(
        self, at_router: TextStates, last: TextStates, texts: Sequence[Sequence[int]], chosen: Sequence[int], stage: str
    ) -> None:
        """Store the states that leave the router's layer and the last layer at some texts, by their numbers."""
        read = self._read(last_site(self.loaded, self.site), [texts[number] for number in chosen], stage)
        for index, hidden, below in read:
            at_router.put(chosen[index], below, self.epsilon)
            last.put(chosen[index], hidden, self.epsilon)

    def states_at(self, texts: Sequence[Sequence[int]], places: Sequence[int], stage: str) -> Tensor:
        """Return the normed state that leaves the router's layer at one place of each text: (B, d)."""
        found = torch.empty(len(texts), self.site.d)
        for index, hidden, _ in self._read(self.site, texts, stage):
            found[index] = _normed(hidden[places[index]], self.epsilon)[0].cpu()
        return found

    def _read(self, site: Site, texts: Sequence[Sequence[int]], stage: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the number of each text, what leaves a site's layer at its tokens (T, d), and the site's keys there."""
        loaded, rows = self.loaded, [Row(tuple(tokens), ()) for tokens in texts]
        groups = list(in_batches(rows, self.batch_size, by_beginning=True))
        batches = (collate([rows[index] for index in indices]).to(loaded.device) for indices in groups)
        read, done = captured(loaded.model, site, batches, stream=loaded.stream, above=False, shared=True), 0
        for indices, activations in zip(groups, read, strict=True):
            mask = activations.batch.mask.bool()
            for place, index in enumerate(indices):
                yield index, activations.hidden[place, mask[place]], activations.keys[place, mask[place]]
            done += len(indices)
            self.on_progress(Event(stage, done, len(rows)))


@dataclass(frozen=True)
class _LastSite(LayerSite):
    """Behind the last layer; its keys are the states that leave the ``watched_layer``."""

    watched_layer: str = ""

    def watched(self, model: nn.Module) -> nn.Module:
        """Return the layer that leaves the keys."""
        return model.get_submodule(self.watched_layer)


def last_site(loaded: Loaded, site: Site) -> Site:
    """Return the site behind a model's last layer, whose keys are the states that leave the layer of another site."""
    layers, watched = layers_of(loaded.model, site), site.layer_module
    number = len(layers) - 1
    module = f"{watched.rpartition('.')[0]}.{number}"
    return _LastSite(site.architecture, number, module, site.d, watched_layer=watched)


def _normed(states: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return states (…, d) divided by their root mean square, in single precision, and what that multiplies by (…)."""
    plain = states.float()
    factors = torch.rsqrt(plain.square().mean(-1, keepdim=True) + epsilon)
    return plain * factors, factors[..., 0]


def rotation_of(loaded: Loaded, site: Site, length: int) -> Rotation:
    """Return how a model's attention behind the router's layer rotates ``length`` tokens, and scales scores."""
    rotary = loaded.model.get_submodule(f"{site.layer_module.rpartition('.')[0].rpartition('.')[0]}.rotary_emb")
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    attention: Any = layers_of(loaded.model, site)[site.layer].self_attn
    return Rotation(cos[0].float(), sin[0].float(), float(attention.scaling))
