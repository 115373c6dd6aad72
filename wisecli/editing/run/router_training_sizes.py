"""What training the router reads and holds, from settings and a model's width alone."""

from __future__ import annotations

from typing import NamedTuple

from wisecli.config import EditSettings
from wisecli.models.layout.site import Site

# Tokens that are read to learn what prompts mean, and what they want; of how many of each something is held.
_MEANT, _WANTED, _COMPARED, _POOLED = 250_000, 1_550_000, 140_000, 750_000
# Bytes that are held of one of the latter for each gate; bytes a number of states, of so many tokens and numbers at a
# time at most.
_POOLED_BYTES, _STATE_BYTES, _TOKENS, _NUMBERS = 640, 8, 80_000, 82_000_000
# Of states narrower than this less is learned, but never less than this share.
_NARROW, _LEAST = 256, 0.1


class RouterTraining(NamedTuple):
    """What training the router reads: tokens of made-up facts, in the layers up to the router's, and of prompts around
    such, in those up to the deep gate's; and how many bytes are held of them at a time.
    """

    router_layers: int
    gate_layers: int
    facts: int
    prompts: int
    held: int

    @classmethod
    def of(cls, settings: EditSettings, site: Site, depth: int) -> RouterTraining:
        """Return what it is at a site of a model with so many layers; nothing, where the router is not trained."""
        if not settings.by_facts:
            return cls(0, 0, 0, 0, 0)
        router, gate = site.router_layer(depth), site.gate_layer(depth)
        narrow = min(1.0, (site.d / _NARROW) ** 2)
        share = min(1.0, settings.unrelated_texts / EditSettings.unrelated_texts, max(_LEAST, narrow))
        facts, prompts = share, share * narrow
        reading = _STATE_BYTES * min(_NUMBERS, site.d * min(_TOKENS, _POOLED * prompts))
        gating = (1 + (gate > router)) * (_POOLED_BYTES * _POOLED * prompts + reading)
        held = max(2 * site.d * _COMPARED * facts, gating)
        return cls(router + 1, gate + 1, round(_MEANT * facts), round(_WANTED * prompts), round(held))
