"""What a worker does, in this process or in another: prepare once for all shards, then write one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from wisecli.artifacts.edit_ranges import split_edits
from wisecli.artifacts.memory_manifest import Made
from wisecli.artifacts.shard import save_shard
from wisecli.artifacts.shard_manifest import ShardDirectory
from wisecli.artifacts.unrelated_stats import BackgroundStats
from wisecli.config import EditSettings, LoadOptions
from wisecli.editing.background import identity_of, unrelated_for
from wisecli.editing.known_facts import known_rows
from wisecli.editing.layer_selection import probe_layer
from wisecli.editing.paraphrases import write_paraphrases
from wisecli.editing.prompt_variants import prompt_variants
from wisecli.editing.shard_writer import ShardWriter
from wisecli.editing.staging import Done
from wisecli.editing.subjects import subject_tokens, subject_words
from wisecli.editing.token_check import Reader
from wisecli.editing.training_examples import encode_edits, write_contexts
from wisecli.edits.admission import Admitted
from wisecli.edits.changes import changed_edits
from wisecli.edits.record import Edit
from wisecli.environment import changed_versions, versions
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.architectures import Layout
from wisecli.models.chat import date_of, fix_date
from wisecli.models.layout_inference import find_layout
from wisecli.models.loading import Loaded, context_window, load_model, load_tokenizer, vocabulary_size
from wisecli.models.resolve import find_model
from wisecli.models.site import find_site, fingerprint
from wisecli.models.site_probe import settled
from wisecli.progress import Event, Watcher, ignore


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done, in words that any process understands.

    ``target_module`` is the path of the value matrix, if it is not the architecture's usual one. ``threads`` decides
    the order in which numbers are added up, and with it the last bits of a shard. ``known`` are edits that are left
    out, as the model says them already, if such are to be left out.
    """

    model: str
    settings: EditSettings
    edits: tuple[Edit, ...]
    load: LoadOptions = LoadOptions()
    target_module: str | None = None
    threads: int = field(default_factory=torch.get_num_threads)
    known: tuple[Edit, ...] | None = None

    @property
    def parts(self) -> list[range]:
        """The edits of every shard, by their places."""
        settings = self.settings
        return split_edits(len(self.edits), shards=settings.shards, edits_per_shard=settings.edits_per_shard)


@dataclass(frozen=True)
class Written:
    """A part that is done, and what puts its shard into a file."""

    number: int
    done: Done
    save: Callable[[Path], None]


class Base:
    """The base model of a job; its files, layout and weights are each read when they are first needed."""

    def __init__(self, job: Job, watch: Watcher, loaded: Loaded | None = None) -> None:
        self.job, self.watch, self._loaded = job, watch, loaded

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's files."""
        return Checkpoint(find_model(self.job.model, revision=self.job.load.revision, watch=self.watch))

    @cached_property
    def layout(self) -> Layout:
        """Where the model keeps its matrices, as far as that can be known without its weights."""
        job, files, lookup = self.job, self.checkpoint, self.job.settings.by_facts
        return find_layout(
            files.directory, files, target_module=job.target_module, lookup=lookup, load=job.load, watch=self.watch
        )

    @cached_property
    def loaded(self) -> Loaded:
        """The model."""
        if self._loaded is not None:
            return self._loaded
        self.watch(Event("model"))
        return load_model(self.checkpoint.directory, self.job.load, layers=self.layout.layers)

    @cached_property
    def reader(self) -> Reader:
        """What reads the edits: the tokenizer, which needs no weights, and the length of the model's window."""
        _ = self.layout  # read first, as a model that cannot be edited is refused before its edits are
        if self._loaded is not None:
            config = self._loaded.model.config
            return Reader(self._loaded.tokenizer, context_window(config), vocabulary_size(config))
        return Reader(*load_tokenizer(self.checkpoint.directory, self.job.load))


class Worker:
    """One process' share of a job.

    Args:
        loaded: the base model, if it is there already.
        base: what another worker of the same model has read of it.
    """

    def __init__(
        self, job: Job, watch: Watcher = ignore, *, loaded: Loaded | None = None, base: Base | None = None
    ) -> None:
        self.job, self.watch = job, watch
        self.base = base or Base(job, watch, loaded)

    @property
    def checkpoint(self) -> Checkpoint:
        """The base model's files."""
        return self.base.checkpoint

    @property
    def layout(self) -> Layout:
        """Where the base model keeps its matrices, as far as that can be known without its weights."""
        return self.base.layout

    @property
    def loaded(self) -> Loaded:
        """The base model."""
        return self.base.loaded

    @property
    def reader(self) -> Reader:
        """What reads the edits, without any weights."""
        return self.base.reader

    def with_edits(self, edits: tuple[Edit, ...]) -> Worker:
        """A worker on some of the edits, as the model knows the others; it takes over the model."""
        known = tuple(edit for edit in self.job.edits if edit not in set(edits))
        return Worker(replace(self.job, edits=edits, known=known), self.watch, base=self.base)

    def without_known(self, admitted: Admitted, *, spared: Collection[str] = ()) -> Admitted:
        """The job's edits without those whose targets the model gives already, after the bare prompt.

        Args:
            admitted: the job's edits.
            spared: ids of edits that stay, whatever the model says.

        Raises:
            ModelError: an edit cannot be put into tokens.
        """
        with _threads(self.job.threads):
            rows = encode_edits(self.loaded, admitted.edits, "", train_end=False)
            known = known_rows(self.loaded, rows, batch_size=self.job.settings.batch_size, watch=self.watch)
        return admitted.without(frozenset(place for place in known if admitted.edits[place].id not in spared))

    def prepare(self) -> tuple[ShardDirectory, BackgroundStats]:
        """Choose the layer, write contexts and measure unrelated text: the plan, without any shard yet.

        Raises:
            ModelError: an edit cannot be put into tokens, or the model not be edited.
        """
        job, settings, checkpoint, layout = self.job, self.job.settings, self.checkpoint, self.layout
        directory = checkpoint.directory
        site = find_site(directory, checkpoint, settings.layer, layout)
        with _threads(job.threads):
            loaded = self.loaded
            fix_date(loaded.tokenizer, job.load.date)  # of a model that has been held for days, it is another by now
            if not layout.known:
                _hold(loaded, site.layer, site.layer + 1)
                free = settings.by_facts and job.target_module is None
                layout = settled(loaded.model, directory, checkpoint, layout, settings.layer, lookup=free)
                site = find_site(directory, checkpoint, settings.layer, layout)
            further = [one.edit for one in prompt_variants(list(enumerate(job.edits)), {}, contexts=0)]
            encode_edits(loaded, [*job.edits, *further], "", train_end=settings.train_end)
            base, size = fingerprint(directory, checkpoint, site), settings.batch_size
            if settings.layer == "auto" and settings.writer == "solve":
                site = probe_layer(
                    loaded,
                    directory,
                    checkpoint,
                    base,
                    batch_size=size,
                    layout=layout,
                    watch=self.watch,
                )
                base = fingerprint(directory, checkpoint, site)
            contexts = write_contexts(loaded, settings)
            paraphrases = write_paraphrases(
                loaded, job.edits, settings.augment, batch_size=size, seed=settings.seed, watch=self.watch
            )
            unrelated = unrelated_for(loaded, site, checkpoint, base, settings, job.edits, self.watch)
        stored = str(directory.absolute()) if Path(job.model).exists() else job.model
        made = Made(
            loaded.device.type,
            str(loaded.model.dtype).removeprefix("torch."),
            job.threads,
            job.target_module,
            checkpoint.sample,
            date_of(loaded.tokenizer),
        )
        subjects = subject_words(loaded.tokenizer, job.edits)
        plan = ShardDirectory(
            directory,
            stored,
            job.load.revision,
            base,
            site,
            asdict(settings),
            tuple(contexts),
            job.edits,
            (),
            "",
            versions(),
            made,
            paraphrases=paraphrases,
            subjects=subjects,
            known=job.known,
            subject_tokens=subject_tokens(loaded.tokenizer, job.edits, subjects),
        )
        return plan, unrelated

    def writer(self, plan: ShardDirectory, unrelated: BackgroundStats) -> ShardWriter:
        """What writes shards by a plan."""
        settings, contexts, worded = self.job.settings, plan.contexts, plan.paraphrases
        matrix = None
        if settings.norm_of == "activated" or settings.weight_decay:
            matrix = plan.site.matrix(self.checkpoint)
        # Whoever goes on with a plan adds numbers up in its order, and on its day.
        fix_date(self.loaded.tokenizer, plan.made.date)
        with _threads(plan.made.threads):
            _hold(self.loaded, plan.site.layer + 1)
            identity = identity_of(plan.fingerprint, self.checkpoint)
            edits, watch, site = plan.edits, self.watch, plan.site
            return ShardWriter(self.loaded, site, settings, unrelated, edits, contexts, worded, watch, matrix, identity)

    def write(self, plan: ShardDirectory, writer: ShardWriter, number: int) -> Written:
        """Write one shard of a plan, unless none of its edits can be."""
        with _threads(plan.made.threads):
            shard, done = writer.write(number, self.job.parts)

        def save(path: Path) -> None:
            assert shard is not None
            assert done.entry is not None
            save_shard(path, shard, seed=self.job.settings.seed, edits=done.entry.edits)

        return Written(number, done, save)


def _hold(loaded: Loaded, first: int, end: int | None = None) -> None:
    """Of a model whose layers are read as they run, keep some in memory."""
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


def differences(plan: ShardDirectory, worker: Worker) -> list[str]:
    """What a job asks for otherwise than a plan that was begun, each as a phrase."""
    job, directory = worker.job, worker.checkpoint.directory
    found = []
    layer: str | int = plan.site.layer if job.settings.layer == "auto" else job.settings.layer
    site = find_site(directory, worker.checkpoint, layer, worker.layout)
    if not site.is_at(plan.site):
        found.append(f"the site was {plan.site.module}, now {site.module}")
    elif fingerprint(directory, worker.checkpoint, plan.site) != plan.fingerprint:
        found.append(f"the model {directory} has changed")
    elif plan.made.sample not in (None, worker.checkpoint.sample):
        found.append(f"weights of the model {directory} have changed")
    found += changed_edits(plan.edits, job.edits)
    settings = asdict(job.settings)
    for name in settings.keys() | plan.settings.keys():
        before, now = plan.settings.get(name), settings.get(name)
        if before != now:
            found.append(f"{name} was {before}, now {now}")
    load = job.load
    if load.dtype not in ("auto", plan.made.dtype):
        found.append(f"dtype was {plan.made.dtype}, now {load.dtype}")
    if load.device.split(":")[0] not in ("auto", plan.made.device):
        found.append(f"device was {plan.made.device}, now {load.device}")
    return sorted([*found, *changed_versions(plan.versions)])
