"""What both sides are measured by: figures of an edited model on records, asked one prompt at a time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peer_easyedit import base_model, tokenizer_of
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from wisecli.edits.record import Edit
from wisecli.evaluation.wild import MAX_NEW_TOKENS, WILD, normalized, stop_tokens
from wisecli.models.prompts.tokenization import encode
from wisecli.models.running.forward_pass import CACHE_ARGUMENT

COLUMNS = ("reliability", "generalization", "locality", "routed", "routed rephrased", "routed unrelated")
WILD_COLUMNS = ("WILD as taught", "WILD rephrased")


@dataclass(frozen=True)
class Edited:
    """An edited model: its passes, what it answers in its own words, and whether its memory answered last.

    ``threshold`` is what a prompt's mean must exceed for that, the lowest of several memories'.
    """

    model: Callable[..., Any]
    generate: Callable[[Tensor], Tensor]
    routed: Callable[[], bool]
    threshold: float


class Watched:
    """Whether a module's output was, in the first pass since this was last asked, other than its own matrix gives."""

    def __init__(self, module: Any, weight: Tensor) -> None:
        self.weight, self.seen = weight, list[bool]()
        module.register_forward_hook(self._look)

    def _look(self, _module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen.append(not torch.equal(output, F.linear(inputs[0], self.weight)))

    def __call__(self) -> bool:
        first, self.seen = self.seen[0], []
        return first


def likeliest(model: Callable[..., Any], prompt: Sequence[int], target: Sequence[int], *, steps: bool) -> Tensor:
    """The likeliest token before each of the target's (t,), read in one pass or, by ``steps``, as it is generated."""
    if not steps:
        logits: Tensor = model(input_ids=torch.tensor([[*prompt, *target]])).logits
        return logits[0, len(prompt) - 1 : -1].argmax(-1)
    cache, found = DynamicCache(), []
    for part in (list(prompt), *([token] for token in target[:-1])):
        found.append(model(input_ids=torch.tensor([part]), **{CACHE_ARGUMENT: cache}).logits[0, -1].argmax(-1))
    return torch.stack(found)


def greedy(model: Any, ids: Tensor) -> Tensor:
    """What a model says after a prompt (1, t), of 50 tokens at most."""
    said: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    return said[0, ids.shape[1] :]


class Measure:
    """Figures of an edited model on records."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.tokenizer, self.base = tokenizer_of(arguments.model), base_model(arguments.model)
        self.stops, self.wild = stop_tokens(self.tokenizer), arguments.wild

    @torch.no_grad()
    def of(self, edited: Edited, edits: Sequence[Edit], *, steps: bool) -> dict[str, list[float]]:
        """Each figure's values, record by record; for ``steps`` see :func:`likeliest`."""
        columns = (*COLUMNS, *WILD_COLUMNS) if self.wild else COLUMNS
        found: dict[str, list[float]] = {name: [] for name in columns}
        for record in edits:
            rephrase = record.rephrases[0]
            for name, routed, prompt in (
                ("reliability", "routed", record.prompt),
                ("generalization", "routed rephrased", rephrase),
            ):
                row = encode(self.tokenizer, prompt, record.target)
                said = likeliest(edited.model, row.prompt, row.target, steps=steps)
                found[name].append(_share(said, torch.tensor(row.target)))
                found[routed].append(float(edited.routed()))
            for probe in record.locality[:1]:
                row = encode(self.tokenizer, probe.prompt, probe.answer or "it")
                ids = torch.tensor([[*row.prompt, *row.target]])
                before = self.base(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].argmax(-1)
                said = likeliest(edited.model, row.prompt, row.target, steps=steps)
                found["locality"].append(_share(said, before))
                found["routed unrelated"].append(float(edited.routed()))
            for name, prompt in zip(WILD_COLUMNS, (record.prompt, rephrase), strict=True) if self.wild else ():
                found[name].append(float(self.said(edited, prompt) == normalized(record.target)))
                edited.routed()
        return found

    def said(self, edited: Edited, prompt: str) -> str:
        """The greedy answer up to the protocol's end."""
        said = edited.generate(
            torch.tensor([self.tokenizer(WILD.render(self.tokenizer, prompt))["input_ids"]])
        ).tolist()
        end = next((place for place, token in enumerate(said) if token in self.stops), len(said))
        return normalized(str(self.tokenizer.decode(said[:end], skip_special_tokens=True)))


def _share(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted).float().mean())
