"""Steps of the paper's method: beside those of its authors' code, and with and without the split at the edited layer.

    python benchmarks/gradient_steps.py peer --easyedit EasyEdit --model MODEL --data zsre_mend_edit.json \\
        --unrelated zsre_mend_train_loc.json --edits 2 --steps 4 --layer 25
    python benchmarks/gradient_steps.py split --model model --data zsre_mend_edit.json
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peer_easyedit import Peer, PeerSequence
from runner import Row, run, show
from torch import Tensor, nn
from torch.nn import functional as F

from wisecli.artifacts.masks import random_mask
from wisecli.artifacts.shard import Mask
from wisecli.config import EditSettings, LoadOptions, resolve
from wisecli.data.corpus import unrelated_texts
from wisecli.editing.examples.context_prefixes import context_prefixes
from wisecli.editing.examples.training_examples import capture_groups, encode_edits, write_contexts
from wisecli.editing.writers import paper_sgd
from wisecli.editing.writers.batched_adam import margin_loss
from wisecli.editing.writers.edit_pass import edit_passes, unrelated_texts_of
from wisecli.editing.writers.writer_task import WriterTask
from wisecli.edits.record import Edit, read_edits
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.matrix_site import MatrixSite, as_matrix
from wisecli.models.layout.site import find_site
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.tokenization import Batch, collate, in_batches
from wisecli.models.prompts.tokenization import Row as Tokens
from wisecli.models.running.activations import capture, captured
from wisecli.models.running.upper_layers import upper_logits
from wisecli.progress import ignore_progress
from wisecli.routing.passes.token_cache import cache_given

BATCH, CONTEXTS = 32, 2
UNRELATED_TEXTS = 48  # about as many tokens as the writer sets against the edits in a step
# A loss from the number of a batch and the mask's values.
Loss = Callable[[int, Tensor], Tensor]


@dataclass
class Step:
    """What one side took a step by: two losses, the gradient's length, and its change of ``W`` afterwards."""

    target: float
    margins: float
    gradient: float = 0.0
    change: Tensor | None = None


def of_peer(peer: Peer, arguments: Namespace, edits: Sequence[Edit], texts: Sequence[str]) -> list[Step]:
    """The steps of the authors' code, and the mask that it drew."""
    steps: list[Step] = []
    code = peer.code.WISE
    cross_entropy, margins, clamp = code._cal_ft_loss, code._cal_activation_loss, code._norm_constraint

    def target(self: Any, *given: Any) -> Tensor:
        found: Tensor = cross_entropy(self, *given)
        steps.append(Step(float(found.detach()), 0.0))
        return found

    def beyond(self: Any, *given: Any, **named: Any) -> Tensor:
        found: Tensor = margins(self, *given, **named)
        steps[-1].margins = float(found.detach())
        return found

    def after(self: Any, constraint: float) -> None:
        adapter = self.get_adapter_layer()
        clamp(self, constraint)
        steps[-1].gradient = float(adapter.new_weight.grad.norm())
        steps[-1].change = (adapter.new_weight - adapter.original_layer.weight).detach().clone()

    code._cal_ft_loss, code._cal_activation_loss, code._norm_constraint = target, beyond, after
    settings = peer.hyperparameters(arguments, n_iter=arguments.steps)
    sequence = PeerSequence(peer, arguments, settings)
    sequence.model.to(getattr(torch, arguments.dtype)).register_forward_pre_hook(from_first_token, with_kwargs=True)
    sequence.train(edits, texts)
    arguments.mask = sequence.adapter.weight_mask.nonzero().flatten()
    arguments.lowest = [sequence.adapter.editing_mean_act.min_act()]
    return steps


def from_first_token(_model: Any, rest: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Positions from each row's first token on, as this package has them: only how angles are rounded changes by it."""
    if (mask := named.get("attention_mask")) is not None and cache_given(named) is None:
        named["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return rest, named


def of_package(arguments: Namespace, edits: Sequence[Edit]) -> Iterator[Step]:
    """The steps of ``--preset paper``."""
    loaded = load_model(arguments.model, LoadOptions(device="cpu"), layers=None)
    loaded.model.to(getattr(torch, arguments.dtype))
    checkpoint = Checkpoint(arguments.model)
    site = as_matrix(find_site(arguments.model, checkpoint, str(arguments.layer)))
    settings = resolve(EditSettings, {"preset": "paper", "passes": arguments.steps}, section="edit")
    contexts = list(enumerate(write_contexts(loaded, settings)[:-1]))
    groups = [([one], contexts, ()) for one in enumerate(edits)]
    found = capture_groups(loaded, site, groups, batch_size=settings.batch_size, train_end=False, window=False)
    batches = [examples for group in found for examples in group]
    texts = unrelated_texts_of(edits, range(len(edits)), seed=0)
    passes = edit_passes(loaded, site, settings, batches, texts, ignore_progress)
    part = passes[0].activations
    lengths, real = part.keys.norm(dim=-1), part.batch.mask.bool()
    arguments.keys = [lengths[~real].max(), lengths[real].median()] if not real.all() else None
    matrix = site.matrix(checkpoint).to(loaded.model.dtype)
    mask = Mask("elements", arguments.mask, site.d, site.d_ff)
    task = WriterTask(loaded.model, site, mask, matrix.new_zeros(1, site.d_ff), 1.0, settings, matrix)
    steps: list[Step] = []

    class Told(paper_sgd.Step):
        def loss(self, values: Tensor, kept: float = 1.0) -> Tensor:
            if values.grad is not None:
                steps[-1].change = mask.dense(values.detach()) + (kept - 1) * matrix
                steps[-1].gradient = float(values.grad.norm())
            loss = super().loss(values, kept)
            steps.append(Step(self.target, self.beyond))
            return loss

    with patch.object(paper_sgd, "Step", Told):
        written = paper_sgd.write_sequential(task, passes, lambda _: None)
    steps[-1].gradient = float("nan")
    arguments.lowest.append(min(written.calls.values()))
    steps[-1].change = mask.dense(written.values) + (written.kept - 1) * matrix
    yield from steps


def _line(peer: Step, own: Step) -> tuple[float, ...]:
    """Losses and gradients of a step by both, and the largest difference of any weight after it."""
    known = peer.change is not None and own.change is not None
    apart = float((peer.change - own.change).abs().max()) if known else 0.0  # type: ignore[operator]
    return peer.target, own.target, peer.margins, own.margins, peer.gradient, own.gradient, apart


def peer(arguments: Namespace) -> None:
    """The first steps by the authors' own code and by this package, side by side.

    Both start from the same weights, with the same contexts, mask and unrelated text. A line has the loss of the target
    and of the margins, the length of the gradient within the mask, and the largest difference of any weight after the
    step; with --by 10 the means of ten steps.
    """
    np.random.seed(arguments.seed)
    edits = list(read_edits(arguments.data))[arguments.skip :][: arguments.edits]
    listed = json.loads(arguments.unrelated.read_text(encoding="utf-8"))[arguments.skip :]
    texts = [f"{one['loc']} {one.get('loc_ans', '')}".strip() for one in listed[: len(edits)]]
    edits = [replace(one, irrelevant=(text,)) for one, text in zip(edits, texts, strict=True)]
    theirs = of_peer(Peer(arguments.easyedit), arguments, edits, texts)
    names = ("target: theirs", "target: ours", "margins: theirs", "margins: ours", "gradient: theirs", "gradient: ours")
    both, rows = [_line(*pair) for pair in zip(theirs, of_package(arguments, edits), strict=True)], list[Row]()
    for start in range(0, len(both), arguments.by):
        lines = torch.tensor(both[start : start + arguments.by], dtype=torch.float64)
        edit, step = divmod(start, arguments.steps)
        means = dict(zip(names, lines[:, :-1].nanmean(0).tolist(), strict=True))
        rows.append({"edit": edit + 1, "step": step, **means, "largest difference": f"{float(lines[-1, -1]):.1e}"})
    show(rows, arguments, title=f"layer {arguments.layer}; of weights the largest difference", digits=5)
    if arguments.keys is not None:
        print("length of a key of the first edit: of padding {:.1f}, median of others {:.1f}".format(*arguments.keys))
    print("lowest mean of any edit once trained: theirs {:.5f}, ours {:.5f}".format(*arguments.lowest))


def train(mask: Mask, batches: int, passes: int, loss: Loss) -> tuple[list[float], float]:
    """Adam on the mask's values; the mean loss and the seconds of a pass."""
    values = torch.zeros(mask.shape, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=EditSettings().learning_rate)
    losses, started = list[float](), time.perf_counter()
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
    given: tuple[Loaded, MatrixSite, Mask, Batch, float], batch: Batch, values: Tensor, *, every: bool
) -> Tensor:
    """Return the loss from running the whole model, the delta added by a hook from the prompt's last token on."""
    loaded, site, mask, unrelated, unit = given
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
    if not every:
        hooks.append(loaded.model.get_output_embeddings().register_forward_pre_hook(pick))
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    logits = loaded.model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    chosen = logits[rows, columns] if every else logits
    unrelated_updates = mask.update(mask.restrict(against), values)
    return total_loss(chosen, batch, updates[0][rows, columns], unrelated_updates, unit)


def split(options: Namespace) -> None:
    """Seconds an edit of the gradient writer with and without the split at the edited layer.

    Both train the same delta in the same minibatches with the same loss and optimiser. With the split, what the layers
    up to the site give is captured once, and a step runs the layers above from the prompt's last token on. `head
    everywhere` projects every position on the vocabulary, `head on targets` those that predict a target token.
    """
    edits, checkpoint = read_edits(options.data, limit=options.edits), Checkpoint(options.model)
    site = as_matrix(find_site(options.model, checkpoint, options.layer))
    loaded = load_model(options.model, load=LoadOptions(device="cpu"))
    mask = random_mask(site, 0.5, "columns", torch.Generator().manual_seed(0))
    prefixes = ["", *context_prefixes(loaded.model, loaded.tokenizer, CONTEXTS, tokens=8, seed=0)]
    rows = [row for prefix in prefixes for row in encode_edits(loaded, edits, prefix, train_end=True)]
    batches = [collate([rows[index] for index in indices]) for indices in in_batches(rows, BATCH, by_target=True)]
    texts = unrelated_texts(1000, seed=0)[-UNRELATED_TEXTS:]
    unrelated = collate([Tokens(tuple(loaded.tokenizer(text)["input_ids"]), ()) for text in texts])
    started = time.perf_counter()
    against = capture(loaded.model, site, unrelated, above=False).keys[unrelated.mask.bool()]
    unit = float((against @ site.matrix(checkpoint).T).norm(dim=-1).median())
    negatives, windows = mask.restrict(against), list(captured(loaded.model, site, batches, window=True))
    capture_seconds = time.perf_counter() - started
    restricted = [mask.restrict(window.keys) for window in windows]

    def split_loss(index: int, values: Tensor) -> Tensor:
        activations = windows[index]
        updates = mask.update(restricted[index], values)
        rows, columns = activations.batch.labelled
        logits = upper_logits(loaded.model, site, activations, activations.with_update(updates), (rows, columns))
        at_labels = updates[rows, columns - activations.first]
        return total_loss(logits, activations.batch, at_labels, mask.update(negatives, values), unit)

    given = loaded, site, mask, unrelated, unit
    ways: dict[str, Loss] = {"split": split_loss}
    ways["whole model, head on targets"] = lambda i, v: whole_model_loss(given, batches[i], v, every=False)
    ways["whole model, head everywhere"] = lambda i, v: whole_model_loss(given, batches[i], v, every=True)
    for loss in ways.values():
        train(mask, 1, 1, loss)
    rows_shown, split_edit = list[Row](), 0.0
    for name, loss in ways.items():
        losses, seconds = train(mask, len(batches), options.passes, loss)
        an_edit = ((capture_seconds if name == "split" else 0.0) + EditSettings().passes * seconds) / len(edits)
        split_edit = split_edit or an_edit
        row: dict[str, object] = {"way": name, "s a pass": seconds, "s an edit": an_edit}
        row |= {"slower by": f"{an_edit / split_edit:.1f}×", "losses": " ".join(f"{value:.4f}" for value in losses)}
        rows_shown.append(row)
    title = f"{len(edits)} edits, layer {site.layer} of {loaded.model.config.num_hidden_layers}"
    show(rows_shown, options, title=title, digits=2, width=120)
    print(f"capture, once: {capture_seconds:.2f} s, counted; s an edit is for {EditSettings().passes} passes")


def peer_options(parser: ArgumentParser) -> None:
    parser.add_argument("--easyedit", type=Path, required=True, help="a checkout of EasyEdit")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--unrelated", type=Path, required=True, help="records with `loc` and perhaps `loc_ans`")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many records")
    parser.add_argument("--edits", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="with each edit")
    parser.add_argument("--by", type=int, default=1, help="steps a line")
    parser.add_argument("--layer", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float64", help="float32 rounds the small difference of two large outputs")


def split_options(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=30)
    parser.add_argument("--layer", default="20")
    parser.add_argument("--passes", type=int, default=5, help="passes to time")


if __name__ == "__main__":
    run(__doc__, {"peer": (peer, peer_options), "split": (split, split_options)})
