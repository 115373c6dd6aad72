"""What every editing method can do, so that all are measured in one way; and the table of methods by name.

A method is made for a loaded model, takes edits in as they come, and can be *applied*: within that, the model answers
as edited; outside it is untouched, to the bit. Methods that put edits into the prompt give
:meth:`Method.rewritten_prompt`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from wisecli.edits.record import Edit
from wisecli.errors import WiseError
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import Layout, layer_count
from wisecli.models.layout.site import MatrixSite
from wisecli.models.loading import Loaded
from wisecli.models.running.shrinking_batches import ROW_DECISIONS
from wisecli.progress import Event, ProgressCallback, ignore_progress
from wisecli.registry import Registry
from wisecli.routing.passes.token_cache import cache_given

Item = TypeVar("Item")


class UnsuitableError(WiseError):
    """A method cannot run on this model or with this data; its row says why."""


@dataclass(frozen=True)
class Bench:
    """What a method may use.

    ``train`` are records of the train split, which no measurement sees; ``texts`` are unrelated texts, for covariances
    and the like. ``site`` gives the value matrix of a layer.
    """

    loaded: Loaded
    checkpoint: Checkpoint
    layout: Layout
    train: Sequence[Edit]
    texts: Sequence[str]
    batch_size: int = 32
    seed: int = 0
    on_progress: ProgressCallback = ignore_progress

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return layer_count(self.checkpoint.directory)

    @property
    def background(self) -> list[str]:
        """The train split's prompts and the unrelated texts, by which methods that look up texts weigh their words."""
        return [*(edit.prompt for edit in self.train), *self.texts]

    def site(self, layer: int) -> MatrixSite:
        """Return the value matrix of a layer."""
        from wisecli.models.layout.matrix_site import as_matrix
        from wisecli.models.layout.site import find_site

        return as_matrix(find_site(self.checkpoint.directory, self.checkpoint, layer, self.layout))


class Method(Protocol):
    """A way to edit a model."""

    def edit(self, edits: Sequence[Edit]) -> None:
        """Write more edits, in the order of the stream.

        Raises:
            UnsuitableError: these edits lack what the method needs.
        """

    def applied(self, first: int | None = None) -> AbstractContextManager[object]:
        """Return the model as edited, for a while.

        Args:
            first: column of the prompts' last token in the rows that will be run, which then hold answers, too; without
                it rows are prompts, whose last column is that token, and what ``generate()`` adds to them.
        """

    def rewritten_prompt(self, prompt: str) -> str:
        """Return what the model is asked in the place of a prompt: by default the prompt itself."""
        return prompt

    def bytes(self) -> int:
        """Return the size of what answers need beside the base model; what only further edits need does not count."""


@runtime_checkable
class Resumable(Protocol):
    """A method that can also continue after it was interrupted.

    ``portion`` is how many edits it takes in together, 0 for all that come; only between portions it is kept.
    """

    portion: int

    def edit(self, edits: Sequence[Edit]) -> None:
        """Take in more edits: see :meth:`Method.edit`."""

    def state(self) -> dict[str, Tensor]:
        """Return all that edits have changed and that later edits or answers depend on."""

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore a stored state; only for a method that has no edits yet.

        Args:
            portions: the edits that it had taken in by then, as they came.
        """


@runtime_checkable
class Gradual(Resumable, Method, Protocol):
    """A resumable method that can also be stored in the middle of a portion."""

    def edit(self, edits: Sequence[Edit]) -> None:
        """Take all steps."""
        for _ in self.steps(edits):
            pass

    def steps(self, edits: Sequence[Edit]) -> Iterator[None]:
        """Take in more edits; after each step a state may be kept, and restored before these edits are given again.

        Raises:
            UnsuitableError: these edits lack what the method needs, or their loss is not finite.
        """


class EditByEdit(Method, Protocol):
    """A method that learns its edits one after the other; ``stage`` is what the progress is called."""

    portion: int = 1
    stage: str
    bench: Bench

    def edit(self, edits: Sequence[Edit]) -> None:
        """Learn each edit in turn."""
        for done, edit in enumerate(edits, start=1):
            self.learn(edit)
            self.bench.on_progress(Event(self.stage, done, len(edits)))

    def learn(self, edit: Edit) -> None:
        """Learn one edit.

        Raises:
            UnsuitableError: the tokenizer leaves nothing of the edit, or its loss is not finite.
        """


Maker = Callable[[Bench], Method]
METHODS: Registry[Maker] = Registry("wisecli.methods")
# Those that do something else to all edits together than to some and then to more.
AT_ONCE: set[str] = set()


def method(name: str, *, at_once: bool = False) -> Callable[[Maker], Maker]:
    """Put a method into the table.

    Args:
        at_once: whether each number of edits is given to one that has taken in none, all together.
    """

    def put(maker: Maker) -> Maker:
        METHODS.add(name, maker)
        if at_once:
            AT_ONCE.add(name)
        return maker

    return put


class PromptEnd:
    """Decisions that are made once a row, at its prompt's last token, and hold while it is answered.

    They lie with the attention cache and lose the rows that it loses. A pass over more than one column begins new rows;
    single columns on a cache go on with them.

    Args:
        first: see :meth:`Method.applied`.
    """

    def __init__(self, first: int | None) -> None:
        self.first = first
        self.mask: Tensor | None = None
        self._cache: Any = None

    def follow_passes(self, model: nn.Module) -> Any:
        """Register a hook that notes the cache and ``mask`` of each pass; return its handle."""

        def see(_model: nn.Module, _inputs: Any, named: dict[str, Any]) -> None:
            self.mask, self._cache = named.get("attention_mask"), cache_given(named)

        return model.register_forward_pre_hook(see, with_kwargs=True)

    def held_decision(self, states: Tensor, decide: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        """Return what was decided for each row, and the column from which it counts.

        Args:
            states: (B, T, …) at some layer.
            decide: from the states at the prompts' last token (B, …) to a decision a row (B, …).
        """
        before: Tensor | None = getattr(self._cache, ROW_DECISIONS, None)
        if states.shape[1] == 1 and before is not None and self.first is None:
            return before, 0
        start = states.shape[1] - 1 if self.first is None else self.first
        choice = decide(states[:, start])
        if self._cache is not None:
            setattr(self._cache, ROW_DECISIONS, choice)
        return choice, start


@contextmanager
def changed(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Replace the values of some parameters within a ``with`` block; afterwards they are the same to the bit."""
    before = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value.to(parameter)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data = value


def require_texts(texts: Sequence[Item]) -> Sequence[Item]:
    """Return unrelated texts, or what was made of them.

    Raises:
        UnsuitableError: there are none.
    """
    if not texts:
        raise UnsuitableError("it needs unrelated texts, and there are none")
    return texts


def require_finite(losses: Tensor, subject: str) -> None:
    """Make sure that a loss, or each of several, is finite.

    Raises:
        UnsuitableError: one is not.
    """
    if not losses.isfinite().all():
        raise UnsuitableError(f"the loss of {subject} is not finite")


def tensor_bytes(*tensors: Tensor) -> int:
    """Return the size of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def seeded(seed: int) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)
