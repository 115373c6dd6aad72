"""What is known of a base model before any edit is written: what it makes of unrelated text, how prompts are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from wisecli.artifacts.background_stats import BackgroundStats, RouterHeads
from wisecli.config import EditSettings
from wisecli.editing.background.background_activations import measure_background
from wisecli.editing.background.key_capture import keys_of_texts
from wisecli.editing.examples.context_prefixes import written_forms
from wisecli.editing.router_training.router_heads import router_heads
from wisecli.editing.router_training.token_characters import vocabulary_characters
from wisecli.editing.router_training.token_states import read_sites
from wisecli.edits.record import Edit
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.digest import sha256_json
from wisecli.models.base_identity import BaseIdentity
from wisecli.models.layout.site import Fingerprint, Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.chat_template import template_digest
from wisecli.models.text_input import context_window
from wisecli.progress import ProgressCallback


@dataclass(frozen=True)
class BackgroundReader:
    """Reads what is known of a base model before any edit is written, or takes it from the user's cache."""

    loaded: Loaded
    checkpoint: Checkpoint
    base: Fingerprint
    settings: EditSettings
    on_progress: ProgressCallback

    def statistics(self, site: Site, edits: Sequence[Edit], former: BackgroundStats | None = None) -> BackgroundStats:
        """Return the statistics of unrelated text; of the texts given with the edits, half calibrate.

        Args:
            former: those of other edits of the same base model, whose router is not learned anew.
        """
        found = self._measured(site)
        if self.settings.by_facts:
            heads, characters = self.heads(site, former), vocabulary_characters(self.loaded.tokenizer)
            found = replace(found, heads=heads, token_characters=characters)
        given = [text for edit in edits for text in edit.irrelevant]
        if not given:
            return found
        keys, text, *_ = keys_of_texts(
            self.loaded, site, given, batch_size=self.settings.batch_size, on_progress=self.on_progress
        )
        keys, calibrating = keys.cpu(), (text % 2 == 0).cpu()
        more = keys[calibrating]
        return replace(
            found,
            keys=torch.cat([found.keys, more]),
            chat=torch.cat([found.chat, torch.zeros(len(more), dtype=torch.bool)]),
            writer_keys=torch.cat([found.writer_keys, keys[~calibrating]]),
        )

    @property
    def _template(self) -> list[str]:
        """What tells models apart that differ in their chat template alone; empty for those without one."""
        written = template_digest(self.loaded.tokenizer)
        return [] if written is None else [written]

    @property
    def identity(self) -> BaseIdentity:
        """By what the base model's heads are known."""
        return BaseIdentity.of(self.checkpoint, self.base.config, self.loaded.tokenizer)

    def _measured(self, site: Site) -> BackgroundStats:
        loaded, settings, template = self.loaded, self.settings, self._template
        identity = model_identity(self.base, self.checkpoint)
        return measure_background(
            loaded,
            site,
            partial(site.base_output, self.checkpoint),
            sha256_json([identity, *template]) if template else identity,
            texts=settings.background_texts,
            chat=settings.chat,
            forms=written_forms(loaded.tokenizer, settings, context_window(loaded.model.config)),
            batch_size=settings.batch_size,
            seed=settings.seed,
            on_progress=self.on_progress,
        )

    def heads(self, site: Site, former: BackgroundStats | None = None) -> RouterHeads:
        """Return the router's heads: those of former statistics if they read the same layers; otherwise those of the
        cache or the package, or newly trained ones.

        The cache knows them by the layer that the router reads, which is the same for most edited layers.
        """
        sites = read_sites(self.loaded, site)
        known = None if former is None else former.heads
        if known is not None and known.reads(sites.router.layer, None if sites.gate is None else sites.gate.layer):
            return known
        return router_heads(
            self.loaded,
            sites,
            self.identity,
            texts=self.settings.unrelated_texts,
            batch_size=self.settings.batch_size,
            on_progress=self.on_progress,
        )


def model_identity(base: Fingerprint, checkpoint: Checkpoint) -> str:
    """Return what identifies a base model in the cache."""
    return sha256_json([base.as_dict(), checkpoint.sample])
