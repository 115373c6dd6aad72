"""LoRA as practitioners train it: on all edits together, in other words and other forms, in shuffled batches.

Each edit is asked as it is written, in up to ``paraphrases`` ways that the model itself writes, and in the forms of
prompts that are marked for training; every answer ends with the end token. AdamW, with a rate that falls to nought.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from wisecli.bench.baselines.base import Bench, method
from wisecli.bench.baselines.lora import Lora, LoraSettings
from wisecli.editing.paraphrases import write_paraphrases
from wisecli.edits.record import Edit
from wisecli.models.forms import usable_forms
from wisecli.models.generation import end_token
from wisecli.models.tokenization import Row, encode
from wisecli.progress import Event


@dataclass(frozen=True)
class Course:
    """Settings: the adapters', passes over all rows, rows a step, and paraphrases an edit."""

    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=16, rate=1e-3))
    passes: int = 8
    batch: int = 16
    paraphrases: int = 4


class LoraParaphrased(Lora):
    """Edits in low-rank adapters that are trained on all that come at once.

    Raises:
        UnsuitableError: as for LoRA.
    """

    portion = 0

    def __init__(self, bench: Bench, course: Course | None = None) -> None:
        self.course = course or Course()
        super().__init__(bench, self.course.lora)

    def edit(self, edits: Sequence[Edit]) -> None:
        """Train on more edits, all of them together."""
        rows, course = list(self.rows(edits)), self.course
        if not rows:
            return
        trained, chance = list(self.parameters.values()), random.Random(self.bench.seed)
        optimizer = torch.optim.AdamW(trained, lr=course.lora.rate)
        steps = course.passes * -(-len(rows) // course.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        with self.applied():
            for done in range(course.passes):
                chance.shuffle(rows)
                for first in range(0, len(rows), course.batch):
                    with torch.enable_grad():
                        loss = self.loss(rows[first : first + course.batch])
                    for parameter, slope in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                        parameter.grad = slope
                    optimizer.step()
                    schedule.step()
                self.bench.watch(Event("adapters", done + 1, course.passes))
        optimizer.zero_grad()

    def rows(self, edits: Sequence[Edit]) -> Iterator[Row]:
        """All that is trained on."""
        loaded, size = self.bench.loaded, self.bench.batch_size
        count, end = self.course.paraphrases, end_token(loaded.model)
        more = write_paraphrases(loaded, edits, count, batch_size=size, seed=self.bench.seed)
        forms = usable_forms(loaded.tokenizer, trained=True)
        for edit in edits:
            asked = [form.asked(loaded.tokenizer, edit.prompt) for form in forms]
            for prompt in dict.fromkeys([edit.prompt, *asked, *more.get(edit.id, ())]):
                yield encode(loaded.tokenizer, prompt, edit.target, end=end)


@method("lora-paraphrased")
def lora_paraphrased(bench: Bench) -> LoraParaphrased:
    """All edits at once."""
    return LoraParaphrased(bench)
