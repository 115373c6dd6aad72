"""Seconds per edit of the gradient writer with and without the split at the edited layer.

Both sides train the same delta on the same rows in the same minibatches with the same loss (cross-entropy and the
router's margin against the same unrelated text) and optimiser. Without the split every step runs the whole model on
whole rows, and the layers up to the site on the unrelated text; with it, all that is captured once, and a step runs the
layers above the site from the prompt's last token on. `head everywhere` projects every position on the vocabulary, as
`model(ids).logits` does; `head on targets` only those that predict a target token.

    python benchmarks/split_speed.py --model model --data zsre_mend_edit.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.artifacts.masks import random_mask
from wisecli.artifacts.shard import Mask
from wisecli.cli.console import quiet_libraries
from wisecli.config import EditSettings, LoadOptions
from wisecli.data.corpus import unrelated_texts
from wisecli.editing.examples.context_prefixes import context_prefixes
from wisecli.editing.examples.training_examples import encode_edits
from wisecli.editing.writers.batched_adam import margin_loss
from wisecli.edits.record import read_edits
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.matrix_site import MatrixSite, as_matrix
from wisecli.models.layout.site import find_site
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.tokenization import Batch, Row, collate, in_batches
from wisecli.models.running.activations import capture, captured
from wisecli.models.running.upper_layers import upper_logits

BATCH = 32
LEARNING_RATE = EditSettings().learning_rate
# About as many tokens as the writer sets against the edits in a step.
UNRELATED_TEXTS = 48


def train(mask: Mask, batches: int, passes: int, loss: Callable[[int, Tensor], Tensor]) -> tuple[list[float], float]:
    """Adam on the mask's values; the mean loss and the seconds of a pass."""
    values = torch.zeros(mask.shape, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=LEARNING_RATE)
    losses = []
    started = time.perf_counter()
    for _ in range(passes):
        total = 0.0
        for index in range(batches):
            optimizer.zero_grad()
            value = loss(index, values)
            value.backward()
            optimizer.step()
            total += value.item()
        losses.append(total / batches)
    return losses, (time.perf_counter() - started) / passes


def total_loss(logits: Tensor, batch: Batch, updates: Tensor, unrelated: Tensor, unit: float) -> Tensor:
    """Cross-entropy and margin, from logits and updates at the labelled columns and updates of unrelated text."""
    entropy = F.cross_entropy(logits, batch.targets)
    edits, against = ((update.square().sum(-1) + 1e-9).sqrt() / unit for update in (updates, unrelated))
    return entropy + margin_loss(edits, against, EditSettings(), torch.Generator().manual_seed(0))


def whole_model_loss(
    loaded: Loaded,
    site: MatrixSite,
    mask: Mask,
    batch: Batch,
    unrelated: Batch,
    unit: float,
    values: Tensor,
    everywhere: bool,
) -> Tensor:
    """The loss from running the whole model, the delta added by a hook from the prompt's last token on."""
    against = capture(loaded.model, site, unrelated, above=False).keys[unrelated.mask.bool()]
    rows, columns = batch.labelled
    window = (torch.arange(batch.ids.shape[1]) >= batch.start)[None, :, None]
    updates = []

    def add(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        updates.append(mask.update(mask.restrict(inputs[0]), values))
        return output + updates[0] * window

    def pick(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][rows, columns],)

    hooks = [site.watched(loaded.model).register_forward_hook(add)]
    if not everywhere:
        hooks.append(loaded.model.get_output_embeddings().register_forward_pre_hook(pick))
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    logits = loaded.model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    chosen = logits[rows, columns] if everywhere else logits
    unrelated_updates = mask.update(mask.restrict(against), values)
    return total_loss(chosen, batch, updates[0][rows, columns], unrelated_updates, unit)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=30)
    parser.add_argument("--layer", default="20")
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--passes", type=int, default=5, help="passes to time")
    whole = EditSettings().passes
    parser.add_argument("--training", type=int, default=whole, help="passes of a whole training, for seconds an edit")
    options = parser.parse_args()
    quiet_libraries()
    edits = read_edits(options.data, limit=options.edits)
    checkpoint = Checkpoint(options.model)
    site = as_matrix(find_site(options.model, checkpoint, options.layer))
    loaded = load_model(options.model, load=LoadOptions(device="cpu"))
    mask = random_mask(site, 0.5, "columns", torch.Generator().manual_seed(0))
    prefixes = ["", *context_prefixes(loaded.model, loaded.tokenizer, options.contexts, tokens=8, seed=0)]
    rows = [row for prefix in prefixes for row in encode_edits(loaded, edits, prefix, train_end=True)]
    batches = [collate([rows[index] for index in indices]) for indices in in_batches(rows, BATCH, by_target=True)]

    texts = unrelated_texts(1000, seed=0)[-UNRELATED_TEXTS:]
    unrelated = collate([Row(tuple(loaded.tokenizer(text)["input_ids"]), ()) for text in texts])

    started = time.perf_counter()
    against = capture(loaded.model, site, unrelated, above=False).keys[unrelated.mask.bool()]
    unit = float((against @ site.matrix(checkpoint).T).norm(dim=-1).median())
    negatives = mask.restrict(against)
    windows = list(captured(loaded.model, site, batches, window=True))
    capture_seconds = time.perf_counter() - started
    restricted = [mask.restrict(window.keys) for window in windows]

    def split_loss(index: int, values: Tensor) -> Tensor:
        activations = windows[index]
        updates = mask.update(restricted[index], values)
        rows, columns = activations.batch.labelled
        logits = upper_logits(loaded.model, site, activations, activations.with_update(updates), (rows, columns))
        at_labels = updates[rows, columns - activations.first]
        return total_loss(logits, activations.batch, at_labels, mask.update(negatives, values), unit)

    ways: dict[str, Callable[[int, Tensor], Tensor]] = {
        "split": split_loss,
        "whole model, head on targets": lambda i, v: whole_model_loss(
            loaded, site, mask, batches[i], unrelated, unit, v, False
        ),
        "whole model, head everywhere": lambda i, v: whole_model_loss(
            loaded, site, mask, batches[i], unrelated, unit, v, True
        ),
    }
    for loss in ways.values():
        train(mask, 1, 1, loss)
    count = loaded.model.config.num_hidden_layers
    table = Table(
        "way",
        "s a pass",
        "s an edit",
        "slower by",
        "losses",
        title=f"{len(edits)} edits, layer {site.layer} of {count}",
    )
    split_edit = 0.0
    for name, loss in ways.items():
        losses, seconds = train(mask, len(batches), options.passes, loss)
        fixed = capture_seconds if name == "split" else 0.0
        an_edit = (fixed + options.training * seconds) / len(edits)
        split_edit = split_edit or an_edit
        shown = " ".join(f"{value:.4f}" for value in losses)
        table.add_row(name, f"{seconds:.2f}", f"{an_edit:.2f}", f"{an_edit / split_edit:.1f}×", shown)
    console = Console(width=120)
    console.print(table)
    console.print(f"capture, once: {capture_seconds:.2f} s, counted; s an edit is for {options.training} passes")


if __name__ == "__main__":
    main()
