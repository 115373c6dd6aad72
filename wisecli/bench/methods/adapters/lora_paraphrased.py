"""LoRA as practitioners train it: on all edits together, in other words and other forms, in shuffled batches.

Each edit is asked as it is written, in up to ``paraphrases`` ways that the model itself writes, and in the forms of
prompts that are marked for training; every answer ends with the end token. AdamW, with a rate that falls to zero.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from wisecli.bench.methods.adapters.lora import Lora, LoraSettings, follow
from wisecli.bench.methods.base import Bench, Gradual, method
from wisecli.bench.methods.resumable_training import Training
from wisecli.bench.methods.weights.weight_editing import encode_row
from wisecli.editing.examples.paraphrases import write_paraphrases
from wisecli.edits.record import Edit
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.tokenization import Row
from wisecli.models.running.generation import end_token
from wisecli.progress import Event


@dataclass(frozen=True)
class LoraParaphrasedSettings:
    """Settings: the adapters', passes over all rows, rows a step, and paraphrases an edit."""

    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=16, rate=1e-3))
    passes: int = 8
    batch: int = 16
    paraphrases: int = 4


@method("lora-paraphrased", at_once=True)
class LoraParaphrased(Lora):
    """Edits in low-rank adapters that are trained on all that come at once.

    Raises:
        UnsuitableError: as for LoRA.
    """

    portion = 0
    edit = Gradual.edit

    def __init__(self, bench: Bench, settings: LoraParaphrasedSettings | None = None) -> None:
        self.schedule = settings or LoraParaphrasedSettings()
        super().__init__(bench, self.schedule.lora)
        self._training: Training | None = None

    def steps(self, edits: Sequence[Edit]) -> Iterator[None]:
        """Train on edits together; a step for writing the paraphrases, and one for each pass."""
        if not edits:
            return
        if self._training is None:
            self._training = Training(list(self.rows(edits)), self._optimizer())
            yield
        training, passes, rng = self._training, self.schedule.passes, random.Random(self.bench.seed)
        for rows in training.shuffled(training.rows, passes, rng):
            self._pass(rows, training)
            self.bench.on_progress(Event("adapters", training.done, passes))
            yield
        training.optimizer.zero_grad()
        self._training = None

    def _optimizer(self) -> Optimizer:
        return torch.optim.AdamW(list(self.parameters.values()), lr=self.schedule.lora.rate)

    def _pass(self, rows: Sequence[Row], training: Training) -> None:
        """Take one step for each batch of rows, at a rate that falls linearly from the first pass to the last."""
        trained, schedule, optimizer = list(self.parameters.values()), self.schedule, training.optimizer
        batches = -(-len(rows) // schedule.batch)
        with self.applied():
            for number in range(batches):
                part = rows[number * schedule.batch : (number + 1) * schedule.batch]
                with torch.enable_grad():
                    loss = self.loss(part)
                follow(loss, trained)
                left = 1 - (training.done * batches + number) / (schedule.passes * batches)
                for group in optimizer.param_groups:
                    group["lr"] = schedule.lora.rate * left
                optimizer.step()
        training.done += 1

    def state(self) -> dict[str, Tensor]:
        """Return the adapters' matrices, and a training that is on its way."""
        return {**super().state(), **(self._training.tensors() if self._training else {})}

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore a stored state."""
        super().restore(state, portions)
        self._training = Training.of(state, self._optimizer())

    def rows(self, edits: Sequence[Edit]) -> Iterator[Row]:
        """Yield all that is trained on."""
        loaded, size = self.bench.loaded, self.bench.batch_size
        count, end = self.schedule.paraphrases, end_token(loaded.model)
        more = write_paraphrases(loaded, edits, count, batch_size=size, seed=self.bench.seed)
        forms = usable_forms(loaded.tokenizer, trained=True)
        for edit in edits:
            prompts = [form.render(loaded.tokenizer, edit.prompt) for form in forms]
            for prompt in dict.fromkeys([edit.prompt, *prompts, *more.get(edit.id, ())]):
                yield encode_row(self.bench, prompt, edit, end=end)
