"""The first steps of the paper's method by its authors' own code and by this package, side by side.

    python benchmarks/peer_steps.py --easyedit EasyEdit --model MODEL --data zsre_mend_edit.json \
        --unrelated zsre_mend_train_loc.json --edits 2 --steps 4 --layer 25

Both take as many steps for each edit, from the same weights, with the same contexts, mask and unrelated text. A line is
a step: the loss of the target and that of the margins on both sides, the length of the step's gradient within the mask,
and the largest difference of any weight after the step. With ``--by 10`` a line has the means of ten steps. Below
stand how long keys are and what the router's threshold is taken from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peer_easyedit import Peer, PeerSequence
from runner import Row, run, show
from torch import Tensor

from wisecli.artifacts.shard import Mask
from wisecli.config import EditSettings, LoadOptions, resolve
from wisecli.editing.examples.training_examples import capture_groups, write_contexts
from wisecli.editing.writers import paper_sgd
from wisecli.editing.writers.edit_pass import edit_passes, unrelated_texts_of
from wisecli.editing.writers.writer_task import WriterTask
from wisecli.edits.record import Edit, read_edits
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.matrix_site import as_matrix
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.progress import ignore_progress
from wisecli.routing.passes.token_cache import cache_given


@dataclass
class Step:
    """What one side took a step by: two losses, the gradient's length, and its change of ``W`` afterwards."""

    target: float
    margins: float
    called: float
    gradient: float = 0.0
    change: Tensor | None = None


def of_peer(peer: Peer, arguments: argparse.Namespace, edits: Sequence[Edit], texts: Sequence[str]) -> list[Step]:
    """The steps of the authors' code, and the mask that it drew."""
    steps: list[Step] = []
    code = peer.code.WISE
    cross_entropy, margins, clamp = code._cal_ft_loss, code._cal_activation_loss, code._norm_constraint

    def target(self: Any, *given: Any) -> Tensor:
        found: Tensor = cross_entropy(self, *given)
        steps.append(Step(float(found.detach()), 0.0, 0.0))
        return found

    def beyond(self: Any, *given: Any, **named: Any) -> Tensor:
        found: Tensor = margins(self, *given, **named)
        adapter = self.get_adapter_layer()
        inside = peer.code.euc(adapter.original_layer_output[:-1], adapter.new_weight_layer_output[:-1], self.config)
        steps[-1].margins, steps[-1].called = float(found.detach()), float(inside.detach().mean())
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


def of_package(arguments: argparse.Namespace, edits: Sequence[Edit]) -> Iterator[Step]:
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
    passes = edit_passes(
        loaded, site, settings, batches, unrelated_texts_of(edits, range(len(edits)), seed=0), ignore_progress
    )
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
            steps.append(Step(self.target, self.beyond, self.called))
            return loss

    with patch.object(paper_sgd, "Step", Told):
        written = paper_sgd.write_sequential(task, passes, lambda _: None)
    steps[-1].gradient = float("nan")
    arguments.lowest.append(min(written.calls.values()))
    steps[-1].change = mask.dense(written.values) + (written.kept - 1) * matrix
    yield from steps


def _line(peer: Step, own: Step) -> tuple[float, ...]:
    """Losses and gradients of a step by both, and the largest difference of any weight after it."""
    apart = 0.0
    if peer.change is not None and own.change is not None:
        apart = float((peer.change - own.change).abs().max())
    return peer.target, own.target, peer.margins, own.margins, peer.gradient, own.gradient, apart


def steps(arguments: argparse.Namespace) -> None:
    """Take the steps by both, and print a table."""
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
    title = f"layer {arguments.layer}; of weights the largest difference"
    show(rows, arguments, title=title, digits=5)
    if arguments.keys is not None:
        print("length of a key of the first edit: of padding {:.1f}, median of others {:.1f}".format(*arguments.keys))
    print("lowest mean of any edit once trained: theirs {:.5f}, ours {:.5f}".format(*arguments.lowest))


def steps_options(parser: argparse.ArgumentParser) -> None:
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


if __name__ == "__main__":
    run(__doc__, {"steps": (steps, steps_options)})
