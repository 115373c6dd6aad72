"""What is known of a base model before any edit is written: what it makes of unrelated text, how prompts are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from wisecli.artifacts.unrelated_stats import BackgroundStats
from wisecli.config import EditSettings
from wisecli.editing.context_prefixes import written_forms
from wisecli.editing.early_states import reading_site
from wisecli.editing.key_capture import keys_of_texts
from wisecli.editing.meaning_learning import learn_heads
from wisecli.editing.token_letters import token_letters
from wisecli.editing.unrelated_activations import measure_unrelated
from wisecli.edits.record import Edit
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.digest import sha256_json
from wisecli.models.chat import written_by
from wisecli.models.loading import Loaded, context_window
from wisecli.models.site import Fingerprint, Site
from wisecli.progress import Watcher


def unrelated_for(
    loaded: Loaded,
    site: Site,
    checkpoint: Checkpoint,
    base: Fingerprint,
    settings: EditSettings,
    edits: Sequence[Edit],
    watch: Watcher,
) -> BackgroundStats:
    """What the model makes of unrelated text; of the texts given with the edits, half calibrate."""
    size, seed = settings.batch_size, settings.seed
    identity, written = identity_of(base, checkpoint), written_by(loaded.tokenizer)
    if written is not None:
        identity = sha256_json([identity, written])
    found = measure_unrelated(
        loaded,
        site,
        partial(site.gives, checkpoint),
        identity,
        texts=settings.unrelated_texts,
        chat=settings.chat,
        forms=written_forms(loaded.tokenizer, settings, context_window(loaded.model.config)),
        batch_size=size,
        seed=seed,
        watch=watch,
    )
    if settings.by_facts:
        reads = reading_site(loaded, site)
        # Of several layers that are edited, most have prompts read at the same one.
        model = sha256_json([base.config, checkpoint.sample, *([] if written is None else [written])])
        heads = learn_heads(loaded, reads, model, texts=settings.unrelated_texts, batch_size=size, watch=watch)
        found = replace(found, heads=heads, letters=token_letters(loaded.tokenizer))
    given = [text for edit in edits for text in edit.irrelevant]
    if not given:
        return found
    keys, text, _ = keys_of_texts(loaded, site, given, batch_size=size, watch=watch)
    keys, calibrating = keys.cpu(), (text % 2 == 0).cpu()
    more = keys[calibrating]
    return replace(
        found,
        keys=torch.cat([found.keys, more]),
        chat=torch.cat([found.chat, torch.zeros(len(more), dtype=torch.bool)]),
        writer_keys=torch.cat([found.writer_keys, keys[~calibrating]]),
    )


def identity_of(base: Fingerprint, checkpoint: Checkpoint) -> str:
    """What a base model is known by in the cache."""
    return sha256_json([base.as_dict(), checkpoint.sample])
