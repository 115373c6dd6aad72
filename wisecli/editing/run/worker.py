"""What a worker does, in this process or in another: prepare once for all shards, then write one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from wisecli.artifacts.background_stats import BackgroundStats
from wisecli.artifacts.memory_manifest import Made
from wisecli.artifacts.shard import save_shard
from wisecli.artifacts.shard_manifest import ShardDirectory, read_shard_directory
from wisecli.config import EditSettings
from wisecli.editing.background.background_cache import BackgroundReader, model_identity
from wisecli.editing.background.layer_selection import probe_layer
from wisecli.editing.evidence.separators import separator_token
from wisecli.editing.examples.known_facts import known_rows
from wisecli.editing.examples.paraphrases import write_paraphrases
from wisecli.editing.examples.prompt_variants import prompt_variants
from wisecli.editing.examples.subject_tokens import subject_spellings, subject_tokens
from wisecli.editing.examples.training_examples import encode_edits, write_contexts
from wisecli.editing.run.base_model import Base
from wisecli.editing.run.job import Job, Written
from wisecli.editing.run.shard_writer import ShardWriter
from wisecli.edits.checks.admission import Admitted
from wisecli.edits.record import Edit
from wisecli.environment import versions
from wisecli.models.layout.site import Fingerprint, Site, find_site, fingerprint
from wisecli.models.layout.site_probe import verified_layout
from wisecli.models.loading import Loaded
from wisecli.models.prompts.chat_template import date_of, fix_date
from wisecli.progress import ProgressCallback, ignore_progress


class Worker:
    """One process' share of a job.

    Args:
        loaded: the base model, if it is there already.
        base: what another worker of the same model has read of it.
    """

    def __init__(
        self,
        job: Job,
        on_progress: ProgressCallback = ignore_progress,
        *,
        loaded: Loaded | None = None,
        base: Base | None = None,
    ) -> None:
        self.job = job if job.threads else replace(job, threads=torch.get_num_threads())
        self.on_progress, self.base = on_progress, base or Base(job, on_progress, loaded)

    def with_edits(self, edits: tuple[Edit, ...]) -> Worker:
        """Return a worker on some of the edits, as the model knows the others; it takes over the model."""
        known = tuple(edit for edit in self.job.edits if edit not in set(edits))
        return Worker(replace(self.job, edits=edits, known=known), self.on_progress, base=self.base)

    def without_known(self, admitted: Admitted, *, spared: Collection[str] = ()) -> Admitted:
        """Return the job's edits without those whose targets the model gives already, after the bare prompt.

        Args:
            admitted: the job's edits.
            spared: ids of edits that stay, whatever the model says.

        Raises:
            ModelError: an edit cannot be put into tokens.
        """
        with _threads(self.job.threads):
            rows = encode_edits(self.base.loaded, admitted.edits, "", train_end=False)
            size = self._settings().batch_size
            known = known_rows(self.base.loaded, rows, batch_size=size, on_progress=self.on_progress)
        return admitted.without(frozenset(place for place in known if admitted.edits[place].id not in spared))

    def prepare(self) -> tuple[ShardDirectory, BackgroundStats]:
        """Choose the layer, write contexts, measure unrelated text; return the plan, without shards, and statistics.

        Raises:
            ModelError: an edit cannot be put into tokens, or the model not be edited.
        """
        job, settings, checkpoint, layout = self.job, self.job.settings, self.base.checkpoint, self.base.layout
        directory = checkpoint.directory
        site = find_site(directory, checkpoint, settings.layer, layout)
        with _threads(job.threads):
            loaded = self.base.loaded
            fix_date(loaded.tokenizer, job.load.date)  # of a model that has been held for days, it is another by now
            if not layout.known:
                _hold_layers(loaded, site.layer, site.layer + 1)
                layout = verified_layout(loaded.model, directory, checkpoint, layout, settings.layer)
                site = find_site(directory, checkpoint, settings.layer, layout)
            further = [variant.edit for variant in prompt_variants(list(enumerate(job.edits)), {}, contexts=0)]
            encode_edits(loaded, [*job.edits, *further], "", train_end=settings.train_end)
            base, running = fingerprint(directory, checkpoint, site), self._settings()
            size = running.batch_size
            if settings.layer == "auto" and settings.writer == "solve":
                site = probe_layer(
                    loaded, directory, checkpoint, base, batch_size=size, layout=layout, on_progress=self.on_progress
                )
                base = fingerprint(directory, checkpoint, site)
            contexts = write_contexts(loaded, settings)
            paraphrases = write_paraphrases(
                loaded, job.edits, settings.augment, batch_size=size, seed=settings.seed, on_progress=self.on_progress
            )
            former = read_shard_directory(job.learned).load_unrelated() if job.learned else None
            reader = BackgroundReader(loaded, checkpoint, base, running, self.on_progress)
            unrelated = reader.statistics(site, job.edits, former)
        return self._plan(site, base, contexts, paraphrases), unrelated

    def _plan(
        self, site: Site, base: Fingerprint, contexts: Sequence[str], paraphrases: dict[str, tuple[str, ...]]
    ) -> ShardDirectory:
        """Return what the manifest of the shards will say, without the shards."""
        job, loaded, checkpoint = self.job, self.base.loaded, self.base.checkpoint
        subjects = subject_spellings(loaded.tokenizer, job.edits)
        return ShardDirectory(
            path=checkpoint.directory,
            model=str(checkpoint.directory.absolute()) if Path(job.model).exists() else job.model,
            revision=job.load.revision,
            fingerprint=base,
            site=site,
            settings=asdict(job.settings),
            contexts=tuple(contexts),
            edits=job.edits,
            shards=(),
            unrelated_sha256="",
            versions=versions(),
            made=Made(
                device=loaded.device.type,
                dtype=str(loaded.model.dtype).removeprefix("torch."),
                threads=job.threads,
                target_module=job.target_module,
                sample=checkpoint.sample,
                date=date_of(loaded.tokenizer),
            ),
            paraphrases=paraphrases,
            subjects=subjects,
            known=job.known,
            subject_tokens=subject_tokens(loaded.tokenizer, job.edits, subjects),
            separator_token_id=separator_token(loaded.tokenizer),
        )

    def writer(self, plan: ShardDirectory, unrelated: BackgroundStats) -> ShardWriter:
        """Return the writer of shards for a plan."""
        settings, matrix = self._settings(), None
        if not settings.by_facts and (settings.norm_of == "activated" or settings.weight_decay):
            matrix = plan.site.matrix(self.base.checkpoint)
        # Whoever goes on with a plan adds numbers up in its order, and on its day.
        fix_date(self.base.loaded.tokenizer, plan.made.date)
        with _threads(plan.made.threads):
            _hold_layers(self.base.loaded, plan.site.layer + 1)
            identity = model_identity(plan.fingerprint, self.base.checkpoint)
            return ShardWriter(
                self.base.loaded, plan, settings, unrelated, self.on_progress, matrix=matrix, identity=identity
            )

    def _settings(self) -> EditSettings:
        """Return the job's settings, with batches of one row for a model that padding disturbs."""
        settings = self.job.settings
        alone = settings.batch_size > 1 and self.base.needs_single_rows
        return replace(settings, batch_size=1) if alone else settings

    def write(self, plan: ShardDirectory, writer: ShardWriter, number: int) -> Written:
        """Write one shard of a plan, unless none of its edits can be."""
        with _threads(plan.made.threads):
            shard, done = writer.write(number, self.job.parts)

        def save(path: Path) -> None:
            assert shard is not None
            assert done.entry is not None
            save_shard(path, shard, seed=self.job.settings.seed, edits=done.entry.edits)

        return Written(number, done, save)


def _hold_layers(loaded: Loaded, first: int, end: int | None = None) -> None:
    """Keep some layers in memory, of a model whose layers are read as they run."""
    if loaded.stream is not None:
        loaded.stream.hold(range(first, len(loaded.stream.layers) if end is None else end))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
