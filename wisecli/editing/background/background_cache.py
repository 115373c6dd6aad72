"""What is known of a base model before any edit is written: what it makes of unrelated text, how prompts are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from wisecli.artifacts.background_stats import BackgroundStats
from wisecli.config import EditSettings
from wisecli.editing.background.background_activations import measure_background
from wisecli.editing.background.key_capture import keys_of_texts
from wisecli.editing.examples.context_prefixes import written_forms
from wisecli.editing.router_training.projection_training import train_projections
from wisecli.editing.router_training.token_characters import vocabulary_characters
from wisecli.editing.router_training.token_states import read_sites
from wisecli.edits.record import Edit
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.digest import sha256_json
from wisecli.models.layout.site import Fingerprint, Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.chat_template import template_digest
from wisecli.models.text_input import context_window
from wisecli.progress import ProgressCallback


def background_for(
    loaded: Loaded,
    site: Site,
    checkpoint: Checkpoint,
    base: Fingerprint,
    settings: EditSettings,
    edits: Sequence[Edit],
    on_progress: ProgressCallback,
    former: BackgroundStats | None = None,
) -> BackgroundStats:
    """Return the statistics of unrelated text; of the texts given with the edits, half calibrate.

    Args:
        former: those of other edits of the same base model, whose router is not learned anew.
    """
    size, seed = settings.batch_size, settings.seed
    identity, written = model_identity(base, checkpoint), template_digest(loaded.tokenizer)
    if written is not None:
        identity = sha256_json([identity, written])
    found = measure_background(
        loaded,
        site,
        partial(site.base_output, checkpoint),
        identity,
        texts=settings.background_texts,
        chat=settings.chat,
        forms=written_forms(loaded.tokenizer, settings, context_window(loaded.model.config)),
        batch_size=size,
        seed=seed,
        on_progress=on_progress,
    )
    if settings.by_facts:
        sites = read_sites(loaded, site)
        heads = None if former is None else former.heads
        if heads is None or not heads.reads(sites.router.layer, None if sites.gate is None else sites.gate.layer):
            # Of several layers that are edited, most have prompts read at the same one.
            model = sha256_json([base.config, checkpoint.sample, *([] if written is None else [written])])
            texts = settings.unrelated_texts
            heads = train_projections(loaded, sites, model, texts=texts, batch_size=size, on_progress=on_progress)
        found = replace(found, heads=heads, token_characters=vocabulary_characters(loaded.tokenizer))
    given = [text for edit in edits for text in edit.irrelevant]
    if not given:
        return found
    keys, text, *_ = keys_of_texts(loaded, site, given, batch_size=size, on_progress=on_progress)
    keys, calibrating = keys.cpu(), (text % 2 == 0).cpu()
    more = keys[calibrating]
    return replace(
        found,
        keys=torch.cat([found.keys, more]),
        chat=torch.cat([found.chat, torch.zeros(len(more), dtype=torch.bool)]),
        writer_keys=torch.cat([found.writer_keys, keys[~calibrating]]),
    )


def model_identity(base: Fingerprint, checkpoint: Checkpoint) -> str:
    """Return what identifies a base model in the cache."""
    return sha256_json([base.as_dict(), checkpoint.sample])
