"""The base model of a job, as far as it is needed: a plan needs neither its weights nor torch."""

from functools import cached_property

from wisecli.editing.examples.token_check import Reader
from wisecli.editing.run.job import Job
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import Layout
from wisecli.models.layout.layout_inference import find_layout
from wisecli.models.loading import Loaded, load_model
from wisecli.models.model_files import find_model
from wisecli.models.text_input import context_window, load_tokenizer, vocabulary_size
from wisecli.progress import NOTE, Event, ProgressCallback


class Base:
    """The base model of a job; its files, layout and weights are each read when they are first needed."""

    def __init__(self, job: Job, on_progress: ProgressCallback, loaded: Loaded | None = None) -> None:
        self.job, self.on_progress, self._loaded = job, on_progress, loaded

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's files."""
        return Checkpoint(find_model(self.job.model, revision=self.job.load.revision, on_progress=self.on_progress))

    @cached_property
    def layout(self) -> Layout:
        """Where the model keeps its layers and matrices, as far as that can be known without its weights."""
        job, files = self.job, self.checkpoint
        return find_layout(
            files.directory,
            files,
            target_module=job.target_module,
            lookup=job.settings.behind_layer,
            load=job.load,
            on_progress=self.on_progress,
        )

    @cached_property
    def loaded(self) -> Loaded:
        """The model."""
        if self._loaded is not None:
            return self._loaded
        self.on_progress(Event("model"))
        return load_model(self.checkpoint.directory, self.job.load, layers=self.layout.layers)

    @cached_property
    def needs_single_rows(self) -> bool:
        """Whether rows must be read one at a time, because padding changes what the model computes for them."""
        from wisecli.models.layout.padding_probe import reads_rows_alike  # imports torch, which a dry run does without

        if self.layout.known or reads_rows_alike(self.loaded.model):
            return False
        note = "this model reads rows of a padded batch otherwise than each alone, so they go one at a time"
        self.on_progress(Event(NOTE, note=note))
        return True

    @cached_property
    def reader(self) -> Reader:
        """What reads the edits: the tokenizer, which needs no weights, and the length of the model's window."""
        _ = self.layout  # read first, as a model that cannot be edited is refused before its edits are
        if self._loaded is not None:
            config = self._loaded.model.config
            return Reader(self._loaded.tokenizer, context_window(config), vocabulary_size(config))
        return Reader(*load_tokenizer(self.checkpoint.directory, self.job.load))
