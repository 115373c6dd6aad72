"""Training examples of a tiny model, to fit residuals to, and what the whole model says with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from support.capturing import capture_examples
from support.helpers import hooked, raised, site_of, tiny_tokenizer
from support.tiny_models import tiny_model
from wisecli.artifacts.masks import random_mask
from wisecli.artifacts.shard import Evidence, Mask, MaskKind
from wisecli.config import EditSettings
from wisecli.editing.evidence.serving_strength import Residuals
from wisecli.editing.evidence.shard_evidence import gather_evidence
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import TrainingExamples
from wisecli.editing.writers.closed_form import fit_residuals
from wisecli.editing.writers.writer_task import WriterTask
from wisecli.edits.record import Edit
from wisecli.models.layout.site import MatrixSite
from wisecli.models.loading import Loaded

EDITS = [
    Edit("one", "ba be bi", "do du"),
    Edit("two", "ka ke ki ko", "fa"),
    Edit("three", "ma me", "ga ge gi"),
    Edit("four", "ta te ti to tu", "la le"),
    Edit("five", "na ne", "ra"),
]
TRAINED = [(0, ""), (1, "pa pe. ")]
HELD_BACK = (2, "so su sa. ")
SETTINGS = EditSettings(residual_steps=150, residual_more=0, residual_rate=0.3, residual_stop=0.3, stop_loss=0.3)
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Bench:
    """A tiny model with batches of all edits, in two groups."""

    loaded: Loaded
    site: MatrixSite
    groups: list[list[TrainingExamples]]
    held_back: list[TrainingExamples]

    @property
    def batches(self) -> list[TrainingExamples]:
        return [examples for group in self.groups for examples in group]

    @property
    def unrelated(self) -> Tensor:
        return torch.randn(60, self.site.d_ff, generator=torch.Generator().manual_seed(11)) * 0.3

    def mask(self, kind: MaskKind = "columns", density: float = 0.8) -> Mask:
        return random_mask(self.site, density, kind, torch.Generator().manual_seed(2))

    def task(self, settings: EditSettings = SETTINGS, mask: Mask | None = None) -> WriterTask:
        return WriterTask(self.loaded.model, self.site, mask or self.mask(), self.unrelated, self.unit, settings)

    @property
    def unit(self) -> float:
        """About the length of what the matrix says."""
        weight = self.loaded.model.get_submodule(self.site.module).get_parameter("weight")
        keys = torch.cat([examples.activations.keys.flatten(0, 1) for examples in self.batches])
        return float((keys @ (weight if self.site.transposed else weight.T)).norm(dim=-1).median())

    def residuals(self, settings: EditSettings = SETTINGS) -> Residuals:
        return fit_residuals(self.task(settings), self.groups, lambda _: None)

    @cached_property
    def evidence(self) -> Evidence:
        residuals = self.residuals()

        def find(_keys: Tensor, answers: Sequence[AnswerKey], positions: Tensor) -> Tensor:
            return torch.stack([residuals[answer][int(p)] for answer, p in zip(answers, positions, strict=True)])

        return gather_evidence([*self.batches, *self.held_back], HELD_BACK[0], find)


def bench_of(architecture: str) -> Bench:
    """A tiny model of an architecture with the edits of this module."""
    model = tiny_model(architecture)
    model.generation_config.eos_token_id = 1
    # With the head as it is drawn, no residual could make a token sure.
    model.get_output_embeddings().get_parameter("weight").data.mul_(4)
    site = site_of(model, 2)
    loaded = Loaded(raised(model, site).requires_grad_(False), tiny_tokenizer())
    numbered = list(enumerate(EDITS))

    def captured(edits: list[tuple[int, Edit]], contexts: list[tuple[int, str]]) -> list[TrainingExamples]:
        return capture_examples(loaded, site, edits, contexts, batch_size=4, train_end=True)

    groups = [captured(numbered[:3], TRAINED), captured(numbered[3:], TRAINED)]
    return Bench(loaded, site, groups, captured(numbered, [HELD_BACK]))


def tokens_of(loaded: Loaded, edit: Edit, context: str) -> tuple[list[int], list[int]]:
    """Prompt and target, the end of text included."""
    prompt = loaded.tokenizer(context + edit.prompt)["input_ids"]
    return prompt, [*loaded.tokenizer(edit.target)["input_ids"], 1]


@torch.no_grad()
def entropies(bench: Bench, number: int, context: str, change: Change) -> tuple[list[float], bool]:
    """Cross-entropy of each target token of an edit, and whether all are the arg-max: the whole model, row by row.

    ``change`` turns keys from the prompt's last token on into what is added to the matrix's output.
    """
    prompt, target = tokens_of(bench.loaded, EDITS[number], context)
    start = len(prompt) - 1

    def add(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        changed = output.clone()
        changed[0, start:] += change(inputs[0][0, start:])
        return changed

    model = bench.loaded.model
    with hooked(model, bench.site, add):
        logits = model(input_ids=torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0, start:]
    losses = nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none")
    return losses.tolist(), logits.argmax(-1).tolist() == target
