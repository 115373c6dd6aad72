"""MEND: a network, trained beforehand, that turns an edit's gradient into a better one (Mitchell et al. 2022).

The gradient of an edit's loss with respect to a matrix is a sum over tokens, Σ δᵢ uᵢᵀ, of the token's key and of the
gradient at what the matrix gives. A network (:mod:`wisecli.bench.methods.weights.hypernetwork`) makes ũ, δ̃ of each
token's u, δ:

    ∇̃ = Σ δ̃ᵢ ũᵢᵀ,    W̃ = W - α ∇̃,    loss = c_edit · -log p_W̃(y | x') + KL(p_W(· | x_loc) ‖ p_W̃(· | x_loc))

with α learned for each matrix, x' a rephrase of the edit's prompt and x_loc an unrelated prompt (their section 3 and
algorithms 1 and 2). The network is trained on the bench's train split when the method is made, which does not count as
time taken by edits; ``training_seconds`` has it.

The paper edits the last three layers' feed-forward part. Here it is the value matrices of the last three layers that
have one above them. All below stays as it is, so each record is captured once, and its u and δ, which belong to the
model before any edit, are found once, too: a step of training runs the layers above only.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.bench.methods.base import Bench, EditByEdit, Item, UnsuitableError, method, require_finite, seeded
from wisecli.bench.methods.weights.gradient_factors import (
    Change,
    Factors,
    changed_logits,
    gradient_factors,
    row_losses,
    row_means,
)
from wisecli.bench.methods.weights.hypernetwork import Editor
from wisecli.bench.methods.weights.weight_editing import WeightEditing, captured_rows, encode_row
from wisecli.edits.record import Edit
from wisecli.models.prompts.tokenization import Row, encode
from wisecli.models.running.activations import Activations
from wisecli.models.running.upper_layers import upper_logits
from wisecli.progress import Event

_MATRICES = 3
# Of an unrelated text, so many tokens stand for an answer.
_TAIL = 4

# An edit, a rewording of it and something unrelated, in tokens.
Lesson = tuple[Row, Row, Row]


@dataclass(frozen=True)
class MendSettings:
    """Settings; ``weight`` is c_edit and ``first_rate`` is α before training.

    The paper trains for tens of thousands of steps of Adam at 1e-6. Here there are a few hundred records and minutes,
    in which nothing would move at that rate: ``rate`` is the one that lowered the loss on held-back records most within
    four passes (1e-4, 3e-4 and 1e-3 were tried, with SmolLM2-135M and zsRE). α is trained as its logarithm, at a rate
    of its own, since the size of a model's gradients is not known beforehand. Training stops when ``patience`` passes
    over the records have not lowered the loss on those held back, a share of ``held_back``, and the best network stays.
    Of more than ``most`` records so many are drawn.
    """

    rank: int = 128
    weight: float = 0.1
    first_rate: float = 0.1
    rate: float = 3e-4
    rate_of_rates: float = 5e-2
    passes: int = 10
    patience: int = 2
    batch: int = 8
    held_back: float = 0.1
    fewest: int = 20
    most: int = 400


@dataclass(frozen=True)
class Task:
    """A batch of training records: the gradient of each, and what the changed model is asked.

    ``unedited`` (n, V) are the unedited model's log-probabilities at the labelled columns of ``unrelated``.
    """

    factors: Sequence[Factors]
    reworded: Activations
    unrelated: Activations
    unedited: Tensor


@method("mend")
class Mend(WeightEditing, EditByEdit):
    """Edits one after the other, each by its pseudo-gradient on the model as edited so far.

    ``validation`` is the loss on held-back records before training and after each pass over the others.

    Raises:
        UnsuitableError: too few records to train on, a loss that is not finite, or a model with streamed layers.
    """

    stage = "pseudo-gradients"

    def __init__(self, bench: Bench, settings: MendSettings | None = None) -> None:
        begun = time.perf_counter()
        self.settings = settings or MendSettings()
        top = bench.layers - 1
        super().__init__(bench, [bench.site(layer) for layer in range(max(0, top - _MATRICES), top)])
        generator = seeded(bench.seed)
        trained, held_back = self._tasks(generator)
        self.editor = Editor(self.sites, self.settings.rank, self.settings.first_rate, generator)
        self.editor.to(bench.loaded.device)
        for index in range(len(self.sites)):
            self.editor.normalise([task.factors[index] for task in trained], index)
        self.validation = self._train(trained, held_back, generator)
        self.training_seconds = time.perf_counter() - begun

    def learn(self, edit: Edit) -> None:
        """Take one step along the pseudo-gradient of an edit."""
        part = self._captured([encode_row(self.bench, edit.prompt, edit)])
        losses, factors = gradient_factors(self.bench.loaded.model, self.sites, part, self.deltas)
        require_finite(losses, f"edit {edit.id!r}")
        for index, factor in enumerate(factors):
            self.deltas[index] = self.deltas[index] - self.step(factor, index)

    @torch.no_grad()
    def step(self, factors: Factors, index: int) -> Tensor:
        """Return α ∇̃ (d, d_ff) of one matrix, summed over the batch."""
        keys, gradients = self.editor(factors, index)
        found: Tensor = gradients.flatten(0, 1).T @ keys.flatten(0, 1)
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the changes and the network, which trained anew may come out otherwise on a GPU."""
        return {**super().state(), **{f"editor {name}": tensor for name, tensor in self.editor.state_dict().items()}}

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore stored changes and network."""
        super().restore(state, portions)
        self.editor.load_state_dict({name: state[f"editor {name}"] for name in self.editor.state_dict()})

    def loss(self, task: Task) -> Tensor:
        """Return the mean of ``c_edit L_e + L_loc`` over a batch; each record alone changes its model."""
        model, changes = self.bench.loaded.model, [self._change(task, index) for index in range(len(self.sites))]
        logits = changed_logits(model, self.sites, task.reworded, changes)
        after = changed_logits(model, self.sites, task.unrelated, changes).log_softmax(-1)
        drift = F.kl_div(after, task.unedited, log_target=True, reduction="none").sum(-1)
        kept = row_means(drift, task.unrelated.batch)
        return (self.settings.weight * row_losses(logits, task.reworded.batch) + kept).mean()

    def _change(self, task: Task, index: int) -> Change:
        """Return ``-α ∇̃ k`` for the keys k of each row, by the pseudo-gradient of that row's own edit."""
        own, gradients = self.editor(task.factors[index], index)
        return lambda keys: -(keys @ own.mT @ gradients)

    def _train(self, tasks: Sequence[Task], held_back: Sequence[Task], generator: torch.Generator) -> list[float]:
        """Train the editor, keeping its best state; return the held-out losses, beginning with the one before."""
        groups: list[dict[str, Any]] = [
            {"params": list(self.editor.networks.parameters()), "lr": self.settings.rate},
            {"params": [self.editor.log_rates], "lr": self.settings.rate_of_rates},
        ]
        optimizer = torch.optim.Adam(groups)
        losses = [self._mean_loss(held_back)]
        if not math.isfinite(losses[0]):
            raise UnsuitableError("the loss of the records that train its network is not finite")
        best, since = copy.deepcopy(self.editor.state_dict()), 0
        while len(losses) <= self.settings.passes and since < self.settings.patience:
            self.bench.on_progress(Event("meta-training", len(losses), self.settings.passes, f"loss {losses[-1]:.4f}"))
            for number in torch.randperm(len(tasks), generator=generator).tolist():
                optimizer.zero_grad()
                self.loss(tasks[number]).backward()
                optimizer.step()
            losses.append(self._mean_loss(held_back))
            since += 1
            if losses[-1] < min(losses[:-1]):
                best, since = copy.deepcopy(self.editor.state_dict()), 0
        self.editor.load_state_dict(best)
        self.editor.requires_grad_(False)
        return losses

    @torch.no_grad()
    def _mean_loss(self, tasks: Sequence[Task]) -> float:
        found = sum(float(self.loss(task)) * len(task.reworded.batch.ids) for task in tasks)
        return found / sum(len(task.reworded.batch.ids) for task in tasks)

    def _tasks(self, generator: torch.Generator) -> tuple[list[Task], list[Task]]:
        """Return batches to train on, and batches that are held back."""
        settings = self.settings
        lessons = [lesson for edit in self.bench.train if (lesson := self._lesson(edit, generator))]
        if len(lessons) < settings.fewest:
            raise UnsuitableError(
                f"mend needs {settings.fewest} records of the train split, which train its network; there are "
                f"{len(lessons)}: give more with --train"
            )
        order = torch.randperm(len(lessons), generator=generator).tolist()[: settings.most]
        cut = max(1, round(settings.held_back * len(order)))
        tasks: list[list[Task]] = []
        for part in (order[cut:], order[:cut]):
            batches = [part[first : first + settings.batch] for first in range(0, len(part), settings.batch)]
            tasks.append([self._task([lessons[index] for index in batch]) for batch in batches])
        return tasks[0], tasks[1]

    def _lesson(self, edit: Edit, generator: torch.Generator) -> Lesson | None:
        """Return a record's rows, with a rephrase and a locality prompt of its own; none if no tokens are left of one.

        Without rephrases the prompt itself stands for one, without locality prompts one of the bench's texts.
        """
        tokenizer = self.bench.loaded.tokenizer
        reworded = drawn(edit.rephrases or (edit.prompt,), generator)
        try:
            rows = encode(tokenizer, edit.prompt, edit.target), encode(tokenizer, reworded, edit.target)
            if edit.locality:
                probe = drawn(edit.locality, generator)
                return *rows, encode(tokenizer, probe.prompt, probe.answer)
        except ValueError:
            return None
        ids = tuple(tokenizer(drawn(self.bench.texts, generator))["input_ids"]) if self.bench.texts else ()
        cut = max(1, len(ids) - _TAIL)
        return (*rows, Row(ids[:cut], ids[cut:])) if ids[cut:] else None

    @torch.no_grad()
    def _task(self, lessons: Sequence[Lesson]) -> Task:
        model = self.bench.loaded.model
        edits, reworded, unrelated = (self._captured(rows) for rows in zip(*lessons, strict=True))
        _, factors = gradient_factors(model, self.sites, edits, self.deltas)
        unedited = upper_logits(model, self.sites[0], unrelated, unrelated.hidden, unrelated.batch.labelled)
        return Task(factors, reworded, unrelated, unedited.float().log_softmax(-1))

    def _captured(self, rows: Sequence[Row]) -> Activations:
        """Return rows up to the lowest matrix, which no edit reaches."""
        return captured_rows(self.bench, self.sites[0], rows, above=False)


def drawn(values: Sequence[Item], generator: torch.Generator) -> Item:
    """Return one of some values, drawn at random."""
    return values[int(torch.randint(len(values), (1,), generator=generator))]
