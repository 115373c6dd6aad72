"""What ``wise export --format merged`` costs: how often the model continues unrelated text differently."""

from pathlib import Path

import torch

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.config import LoadOptions
from wisecli.data.corpus import unrelated_texts
from wisecli.export.routed.checkpoint import dense
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import collate, encode, in_batches
from wisecli.models.running.activations import capture
from wisecli.models.running.upper_layers import upper_logits
from wisecli.progress import Event, ProgressCallback

_TEXTS, _BATCH = 200, 32


@torch.no_grad()
def merged_locality(
    base: Path, manifest: Manifest, *, load: LoadOptions, on_progress: ProgressCallback
) -> tuple[float, int]:
    """Return the share of unrelated tokens whose successor's arg-max survives ``W + Δ``, and the number of tokens."""
    change = dense(manifest)
    loaded = load_model(base, load)
    change = change.to(loaded.device)
    probes = [(probe.prompt, probe.answer) for edit in manifest.edits for probe in edit.locality]
    words = [text.split(maxsplit=1) for text in unrelated_texts(_TEXTS, seed=1)]
    rows = [encode(loaded.tokenizer, *pair) for pair in [*probes, *((w[0], w[1]) for w in words if len(w) == 2)]]
    same = total = 0
    for indices in in_batches(rows, _BATCH):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        activations = capture(loaded.model, manifest.site, batch, select=batch.labelled)
        hidden = activations.with_update(activations.keys @ change.T.to(activations.keys.dtype))
        changed = upper_logits(loaded.model, manifest.site, activations, hidden, batch.labelled)
        same += int((changed.argmax(-1) == activations.logits.argmax(-1)).sum())
        total += len(changed)
        on_progress(Event("locality", total, 0))
    return same / total, total
