"""One shard after the other: captures edits, lets a writer find the change, gathers the evidence, writes the file."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wisecli.artifacts.background_stats import BackgroundStats
from wisecli.artifacts.masks import draw_mask
from wisecli.artifacts.shard import Evidence, PromptStates, Shard
from wisecli.artifacts.shard_manifest import ShardDirectory, ShardEntry
from wisecli.config import EditSettings
from wisecli.editing.evidence.attention_sinks import median_state_norm
from wisecli.editing.evidence.extra_keys import FittedEdits
from wisecli.editing.evidence.separators import separator_evidence
from wisecli.editing.evidence.serving_strength import STRENGTH, Residuals, bare_prompt_accuracy, weakened_where_needed
from wisecli.editing.evidence.shard_evidence import Residual, gather_evidence, with_extra_keys
from wisecli.editing.evidence.token_probe import TokenProbe
from wisecli.editing.examples.context_prefixes import CHAT
from wisecli.editing.examples.erasure import ErasureRows, erasure_rows
from wisecli.editing.examples.prompt_variants import AnswerKey, prompt_variants
from wisecli.editing.examples.training_examples import (
    Group,
    NotFiniteError,
    TrainingExamples,
    capture_groups,
    encode_edits,
    require_finite,
)
from wisecli.editing.router_training.token_states import prompt_states, read_sites
from wisecli.editing.run.staging import FinishedPart
from wisecli.editing.writers.batched_adam import write_batched
from wisecli.editing.writers.closed_form import fit_residuals, write_solved
from wisecli.editing.writers.edit_pass import edit_passes, unrelated_texts_of
from wisecli.editing.writers.paper_sgd import with_changed_mask, write_sequential
from wisecli.editing.writers.target_accuracy import learnt, unedited_losses
from wisecli.editing.writers.writer_task import Progress, WriterTask
from wisecli.errors import ModelError
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import in_batches
from wisecli.progress import NOTE, Event, ProgressCallback

# So many edits of a shard, spaced evenly, are read in the context that is held back: they check, and train nothing.
_HELD_BACK = 32
_NOT_FINITE = "the model gives nothing finite for"

# A shard, the mean losses of its passes, its penalty, and the share of each edit's target tokens that it makes arg-max.
_Outcome = tuple[Shard, tuple[float, ...], tuple[float, float] | None, dict[int, float]]


class ShardWriter:
    """Writes one shard after the other, all against the same unrelated text; the last context is held back."""

    def __init__(
        self,
        loaded: Loaded,
        plan: ShardDirectory,
        settings: EditSettings,
        unrelated: BackgroundStats,
        on_progress: ProgressCallback,
        *,
        matrix: Tensor | None,
        identity: str,
    ) -> None:
        self.loaded, self.site, self.settings, self.unrelated = loaded, plan.site, settings, unrelated
        self.edits, self.contexts, self.paraphrases = plan.edits, plan.contexts, plan.paraphrases
        self.on_progress = on_progress
        self.writer_keys = unrelated.writer_keys.to(loaded.device)
        output = float(unrelated.median_output_norm) * self.site.unit
        self.unit = output if settings.margin_unit == "output" else 1.0
        self.matrix = None if matrix is None else matrix.to(loaded.device).float()
        self.token_probe = TokenProbe(loaded, plan.site, settings.batch_size, identity)
        self.erasures: ErasureRows = {}

    def write(self, number: int, parts: Sequence[range]) -> tuple[Shard | None, FinishedPart]:
        """Write one of the parts that the edits are split into; the shard, and what its manifest says of it.

        Edits for which the model gives nothing finite are left out; if that is all of them, there is no shard.
        """
        started = time.perf_counter()
        settings, stage = self.settings, f"shard {number + 1}/{len(parts)}"
        kind, count, apart, seed = settings.mask_kind, len(parts), settings.masks == "disjoint", settings.seed
        self.on_progress(Event(stage))
        mask = draw_mask(self.site, settings.mask_ratio, kind, number=number, count=count, disjoint=apart, seed=seed)
        drawn = mask.to(self.loaded.device)
        task = WriterTask(self.loaded.model, self.site, drawn, self.writer_keys, self.unit, settings, self.matrix)
        write = self._solve if settings.writer == "solve" else self._train
        mine = [self.edits[place] for place in parts[number]]
        self.erasures = erasure_rows(self.loaded, mine, chat=CHAT in self.contexts, batch_size=settings.batch_size)
        left_out: set[int] = set()
        while part := [place for place in parts[number] if place not in left_out]:
            try:
                shard, losses, penalty, shares = write(task, part, stage)
            except NotFiniteError as error:
                left_out |= error.edits
                self.on_progress(
                    Event(NOTE, note=f"{_NOT_FINITE} {', '.join(self._names(sorted(error.edits)))}: left out")
                )
                continue
            ids, untaken = self._names(part), self._names(place for place in part if shares[place] < 1)
            seconds = round(time.perf_counter() - started, 3)
            solved = shard.values is not None
            file = f"shard-{number:05d}.safetensors"
            entry = ShardEntry(file, "", kind, ids, losses, seconds, penalty, untaken, solved)
            return shard, FinishedPart(entry, self._names(sorted(left_out)))
        return None, FinishedPart(None, self._names(sorted(left_out)))

    def _names(self, places: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.edits[place].id for place in places)

    def _train(self, task: WriterTask, part: Sequence[int], stage: str) -> _Outcome:
        """Train by the paper's writer; the residuals are what the trained change adds."""
        each, on_progress = self.settings.sequential, _report_accuracy(stage, self.on_progress)
        groups, held_back = self._capture([[place] for place in part] if each else [part])
        batches = [examples for group in groups for examples in group]
        if each:
            texts = unrelated_texts_of(self.edits, part, seed=self.settings.seed)
            passes = edit_passes(self.loaded, self.site, self.settings, batches, texts, self.on_progress)
            written = write_sequential(task, passes, on_progress)
        else:
            written = write_batched(task, batches, on_progress)
        if not written.values.isfinite().all():
            self._blame(task, batches, stage)
        task, changed = with_changed_mask(task, written)
        values, mask = changed.cpu(), task.mask.to(torch.device("cpu"))
        evidence = gather_evidence(
            [examples.from_window() for examples in (*batches, *held_back)],
            len(self.contexts) - 1,
            lambda keys, _answers, _positions: mask.update(mask.restrict(keys), values),
        )
        if self.settings.pooling == "mean":
            evidence = replace(evidence, call=torch.tensor([written.calls[edit] for edit in evidence.edit.tolist()]))
        shares = learnt(task.model, self.site, task.mask, changed, batches)
        return Shard(mask, values, evidence, self._prompts(part, stage)), written.losses, None, shares

    def _blame(self, task: WriterTask, batches: Sequence[TrainingExamples], stage: str) -> None:
        """Raise the error that says why training ended in numbers that are not finite."""
        losses = unedited_losses(task.model, self.site, batches)
        if lost := [edit for edit, loss in losses.items() if not math.isfinite(loss)]:
            raise NotFiniteError(lost)
        raise ModelError(f"{stage}: training ran away from finite numbers; lower learning_rate")

    def _solve(self, task: WriterTask, part: Sequence[int], stage: str) -> _Outcome:
        """Fit residuals, then solve for the matrix, unless the memory is to be a lookup."""
        edits = [self.edits[place] for place in part]
        rows = encode_edits(self.loaded, edits, "", train_end=self.settings.train_end, erasures=self.erasures)
        alike = in_batches(rows, self.settings.batch_size, by_target=True)
        groups, held_back = self._capture([[part[index] for index in indices] for indices in alike])
        batches = [examples for group in groups for examples in group]
        task = replace(task, median_state_norm=median_state_norm(batches))
        residuals = fit_residuals(task, groups, _report_loss(stage, self.on_progress))
        strength = 1.0
        if self.settings.by_facts:
            strength, residuals = STRENGTH, weakened_where_needed(task, batches, residuals)
        last, looked_up = len(self.contexts) - 1, _residual_lookup(residuals)
        evidence = gather_evidence([*batches, *held_back], last, looked_up, median_norm=task.median_state_norm)
        mask, solved = task.mask.to(torch.device("cpu")), None
        if not self.settings.for_lookup:
            tokens = self.unrelated.tokens.dense(mask.indices if mask.kind == "columns" else None)
            solved = write_solved(
                task, evidence, tokens, batches, held_back, _report_accuracy(f"{stage} polish", self.on_progress)
            )
        shares = bare_prompt_accuracy(task, batches, residuals, strength)
        if self.settings.by_facts:
            asked = dict(zip(part, rows, strict=True))
            fitted = FittedEdits(self.token_probe, residuals, asked, task.median_state_norm)
            evidence = Evidence.joined([with_extra_keys(evidence, fitted), *separator_evidence(task, batches, fitted)])
        prompts = self._prompts(part, stage)
        if solved is None:
            return Shard(mask, None, evidence, prompts), (), None, shares
        penalty = solved.penalty.ridge, solved.penalty.unrelated
        return Shard(mask, solved.values.cpu(), evidence, prompts), solved.losses, penalty, shares

    def _prompts(self, part: Sequence[int], stage: str) -> PromptStates | None:
        """Return the early states of the edits' prompts, if these are routed by meaning."""
        if not self.settings.by_facts:
            return None
        return prompt_states(
            self.loaded,
            read_sites(self.loaded, self.site),
            [(place, self.edits[place]) for place in part],
            batch_size=self.settings.batch_size,
            on_progress=self.on_progress,
            stage=f"{stage} prompts",
        )

    def _capture(self, groups: Sequence[Sequence[int]]) -> tuple[list[list[TrainingExamples]], list[TrainingExamples]]:
        """Return examples of each group in all contexts that are trained, and of some edits in the one held out.

        Raises:
            NotFiniteError: naming the edits for which the model gives nothing finite.
        """
        *trained, last = enumerate(self.contexts)
        numbered = [[(place, self.edits[place]) for place in group] for group in groups]
        everyone = sorted((pair for group in numbered for pair in group), key=lambda pair: pair[0])
        checking = everyone[:: -(-len(everyone) // _HELD_BACK)]
        count, settings = len(self.contexts), self.settings
        further = [prompt_variants(group, self.paraphrases, contexts=count) for group in numbered]
        wanted: list[Group] = [(group, trained, more) for group, more in zip(numbered, further, strict=True)]
        wanted.append((checking, [last], ()))
        *found, held_back = capture_groups(
            self.loaded,
            self.site,
            wanted,
            batch_size=settings.batch_size,
            train_end=settings.train_end,
            erasures=self.erasures,
            window=settings.pooling != "mean",
        )
        require_finite([examples for group in (*found, held_back) for examples in group])
        return found, held_back


def _residual_lookup(residuals: Residuals) -> Residual:
    """Return a function that finds residuals (n, d) by answer and position."""

    def find(_keys: Tensor, answers: Sequence[AnswerKey], positions: Tensor) -> Tensor:
        pairs = zip(answers, positions.tolist(), strict=True)
        return torch.stack([residuals[answer][position] for answer, position in pairs]).cpu()

    return find


def _report_loss(stage: str, on_progress: ProgressCallback) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        on_progress(Event(stage, progress.step, progress.steps, f"loss {progress.loss:.3f}"))

    return tell


def _report_accuracy(stage: str, on_progress: ProgressCallback) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        note = f"loss {progress.loss:.3f}, {progress.accuracy:.0%} of target tokens"
        on_progress(Event(stage, progress.step, progress.steps, note))

    return tell
