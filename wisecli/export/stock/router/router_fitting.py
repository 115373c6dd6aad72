"""A memory's router, fitted: what is learned once a base model, and each edit's own relation, subject and places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.edits.record import Edit
from wisecli.export.stock.gate_states import edit_states
from wisecli.export.stock.router.answer_places import answer_places
from wisecli.export.stock.router.late_states import late_states, rotation_of
from wisecli.export.stock.router.reader_training import relation_reader
from wisecli.export.stock.router.relation_reader import RelationReader
from wisecli.export.stock.router.router_blocks import Router
from wisecli.export.stock.router.subject_detectors import name_states, subject_detectors
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.progress import ProgressCallback

# Log odds that an edit without a subject has to be surer by.
_SURER = 3.0


def fitted_router(
    loaded: Loaded, manifest: Manifest, identity: str, share: float, *, batch_size: int, on_progress: ProgressCallback
) -> Router:
    """Return the router of a memory.

    Args:
        identity: of the base model, for the cache.
        share: how much of the packaged text is read.
    """
    site, edits = manifest.site, manifest.edits
    reader = relation_reader(loaded, site, identity, share=share, batch_size=batch_size, on_progress=on_progress)
    names = name_states(loaded, site, identity, batch_size=batch_size, on_progress=on_progress)
    detectors = subject_detectors(loaded, site, edits, names, batch_size=batch_size, on_progress=on_progress)
    relations = relation_codes(loaded, site, reader, edits, batch_size=batch_size, on_progress=on_progress)
    places = answer_places(edit_states(loaded, manifest, batch_size=batch_size, on_progress=on_progress), len(edits))
    thresholds = torch.where(detectors.subject < 0, _SURER, 0.0) + reader.threshold.detach()
    scaling = rotation_of(loaded, site, 1).scaling
    return Router(reader, relations, thresholds, detectors, places, 1 / float(reader.gain), scaling)


@torch.no_grad()
def relation_codes(
    loaded: Loaded,
    site: Site,
    reader: RelationReader,
    edits: Sequence[Edit],
    *,
    batch_size: int,
    on_progress: ProgressCallback,
) -> Tensor:
    """Return the code of each edit's relation (e, c), of length 1: the mean over its own prompts in trained forms."""
    tokenizer = loaded.tokenizer
    own = [(number, [edit.prompt, *(one.prompt for one in edit.translations)]) for number, edit in enumerate(edits)]
    forms = usable_forms(tokenizer, trained=True)
    asked = [(number, form.render(tokenizer, text)) for number, texts in own for text in texts for form in forms]
    tokens = [tokenizer(text)["input_ids"] for _, text in asked]
    read = late_states(loaded, site, tokens, batch_size=batch_size, on_progress=on_progress, stage="edits")
    rotation = rotation_of(loaded, site, max(map(len, tokens)))
    numbers, codes = torch.tensor([number for number, _ in asked]), []
    for rows in torch.arange(len(tokens)).split(batch_size):
        lengths = torch.tensor([len(tokens[index]) for index in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        index = (read.first[rows][:, None] + torch.arange(mask.shape[1]))[mask]
        features = reader.token_features(read.normed[index].float(), read.inverse[index])
        laid_out = features.new_zeros(*mask.shape, features.shape[-1]).masked_scatter(mask[..., None], features)
        codes.append(reader.pooled(laid_out, mask, lengths - 1, rotation)[0])
    summed = torch.zeros(len(edits), codes[0].shape[1]).index_add(0, numbers, torch.cat(codes))
    return F.normalize(summed, dim=-1)
