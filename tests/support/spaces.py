"""A tiny model whose attention rests on spaces, and two edits whose targets begin with one."""

import torch
from torch import Tensor

from support.capturing import capture_examples
from support.helpers import site_of, tiny_qwen2_tokenizer
from support.tiny_models import tiny_model
from wisecli.artifacts.masks import random_mask
from wisecli.artifacts.shard import Evidence
from wisecli.config import EditSettings
from wisecli.editing.evidence.attention_sinks import median_state_norm
from wisecli.editing.evidence.shard_evidence import gather_evidence
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import TrainingExamples, encode_edits
from wisecli.editing.writers.closed_form import fit_residuals
from wisecli.editing.writers.writer_task import WriterTask
from wisecli.edits.record import Edit
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row

EDITS = [Edit("year", "when ba be", "abc"), Edit("word", "ka ke ki", "doe")]
SETTINGS = EditSettings(residual_steps=150, residual_more=0, residual_rate=0.3, residual_stop=0.3, batch_size=8)
LAYER = 2


class Bench:
    """A tiny model whose attention rests on spaces, and what two edits are trained with."""

    def __init__(self) -> None:
        model = tiny_model("qwen2")
        model.generation_config.eos_token_id = 1
        model.get_output_embeddings().get_parameter("weight").data.mul_(4)
        self.loaded = Loaded(model.requires_grad_(False), tiny_qwen2_tokenizer())
        self.site = site_of(model, LAYER)
        self.space = self.loaded.tokenizer(" ")["input_ids"][0]
        model.get_input_embeddings().get_parameter("weight").data[self.space] *= 40

    def examples(self) -> list[TrainingExamples]:
        numbered = list(enumerate(EDITS))
        return capture_examples(self.loaded, self.site, numbered, [(0, ""), (1, "pa. ")], batch_size=8, train_end=True)

    def task(self, usual: float) -> WriterTask:
        mask = random_mask(self.site, 0.5, "columns", torch.Generator().manual_seed(1))
        unrelated = torch.randn(30, self.site.d_ff, generator=torch.Generator().manual_seed(2))
        return WriterTask(self.loaded.model, self.site, mask, unrelated, 1.0, SETTINGS, median_state_norm=usual)

    @torch.no_grad()
    def length(self, tokens: list[int]) -> Tensor:
        """The length of the last token's state behind the edited layer, in the whole model."""
        whole = self.loaded.model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        return whole.hidden_states[LAYER + 1][0, -1].norm()


def evidence_of(
    bench: Bench, examples: list[TrainingExamples], task: WriterTask, residuals: dict[AnswerKey, Tensor]
) -> Evidence:
    def find(_keys: Tensor, answers: list[AnswerKey], positions: Tensor) -> Tensor:
        return torch.stack([residuals[one][place] for one, place in zip(answers, positions.tolist(), strict=True)])

    return gather_evidence(examples, 9, find, median_norm=task.median_state_norm)  # type: ignore[arg-type]


def with_evidence(
    bench: Bench, usual: float | None = None
) -> tuple[dict[AnswerKey, Tensor], Evidence, dict[int, Row], float]:
    """Residuals and evidence of two edits, their rows, and the length of a usual state."""
    examples = bench.examples()
    task = bench.task(median_state_norm(examples) if usual is None else usual)
    residuals = fit_residuals(task, [examples], lambda _: None)
    rows = dict(enumerate(encode_edits(bench.loaded, EDITS, "", train_end=True)))
    return residuals, evidence_of(bench, examples, task, residuals), rows, task.median_state_norm
