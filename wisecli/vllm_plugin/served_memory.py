"""A side memory within a vLLM model: it decides what answers prompts, and adds residuals in the edited layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from wisecli.artifacts.former_names import current_description, current_marks, current_names
from wisecli.routing.deciding.decision import Decision
from wisecli.routing.deciding.prompt_window import UNROUTED, TurnMarks, is_any, window_size, windows
from wisecli.routing.deciding.subject_filter import SubjectFilter
from wisecli.routing.layers.routed_layer import memory_module as memory_alone
from wisecli.routing.memories.fact_memory import FactMemory
from wisecli.routing.memories.side_memory import Memory, SideMemory
from wisecli.routing.passes.engine_checks import LostMemoryError
from wisecli.routing.passes.routed_pass import placeholders_of
from wisecli.routing.passes.window_reading import WindowReading
from wisecli.vllm_plugin.processes import ALONE, Processes
from wisecli.vllm_plugin.releases import ReleaseError, made_for, read_release, release_in
from wisecli.vllm_plugin.requests import Requests, StepRoute, batches, padded

_LOG = logging.getLogger(f"vllm.{__name__}")  # whose messages vLLM shows

# Most of what a lookup holds. It is read a few rows at a time, and computed with in float32 whatever it is kept in.
_AS_STORED = {"whitened_keys", "residuals", "late_interaction.prompt_token_embeddings"}
# Places of tokens (n,) → their keys (n, width), and whether this process adds what they open.
Keys = Callable[[Tensor], tuple[Tensor, bool]]
# States (W, d) of each of some windows at the next layer that is read → the decision, if they are enough for one.
Take = Callable[[Sequence[Tensor]], Decision | None]


class Reader(Protocol):
    """Reads states of windows; ``before_run`` is called with the number of tokens of each run.

    ``adds_rest`` says of a decoder layer that gives two tensors whether their sum is the state that leaves it.
    """

    before_run: Callable[[int], None] | None
    adds_rest: bool

    def parts(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Yield parts of windows, by their lengths, that are run together."""

    def run(self, windows: Sequence[Tensor], take: Take) -> Decision:
        """Run windows of token ids (W,) up to the layer at which they are decided, and return the decision."""


@dataclass(frozen=True)
class Edited:
    """What a checkpoint's config says of its memory: its path, the memory without tensors, and turn marks.

    ``behind`` says that it is behind a decoder layer and not beside a matrix; ``read`` are the layers whose states
    decide, if any do.
    """

    module: str
    memory: Mapping[str, Any]
    marks: TurnMarks
    behind: bool
    read: tuple[int, ...] = ()

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Edited:
        """Read a description.

        Raises:
            ValueError: no engine but transformers runs such a memory.
        """
        memory = current_description(described["memory"])
        if memory.get("activated"):
            raise ValueError(
                "this memory opens by what the activation function makes of its changes, which runs in transformers "
                "alone: serve what the closed form writes of the same edits"
            )
        if described.get("streams") is not None:
            raise ValueError("these edits are added to one of several streams, which runs in transformers alone")
        marks = TurnMarks.from_dict(current_marks(described.get("marks")))
        behind = "transposed" not in described
        layers = (memory[name] for name in ("state_layer", "gate_layer") if memory.get(name) is not None)
        return cls(described["module"], described["memory"], marks, behind, tuple(layers))


def described_memory(described: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Memory:
    """Return a described memory alone, on a device: vLLM multiplies by the base's weights."""
    memory = memory_alone(SideMemory.from_description(current_description(described), tensors))
    for name in _AS_STORED & tensors.keys() if isinstance(memory, FactMemory) else ():
        part, _, own = name.rpartition(".")
        setattr(memory.get_submodule(part), own, tensors[name])
    return memory.to(device)


@dataclass(frozen=True)
class _Served:
    """A release of a memory, what tells prompts that it cannot answer, and the requests that it has decided."""

    memory: Memory
    may_answer: SubjectFilter
    requests: Requests


class ServedMemory:
    """The memory of a model in vLLM.

    Args:
        edited: what the checkpoint says of it.
        config: the model's, as transformers has it.
        reader: reads states of windows.
        checkpoint: the directory that holds it; ``None`` if later releases are not to be read from there.
        cut: whether processes have parts of the keys, and of the answer.
        processes: those that serve the memory together.
    """

    def __init__(
        self,
        edited: Edited,
        config: Any,
        reader: Reader,
        checkpoint: Path | None = None,
        *,
        cut: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.edited, self.reader, self.cut, self._processes = edited, reader, cut, processes
        self._window = window_size(config)
        self._placeholders = placeholders_of(config)
        self._checkpoint, self._seen = checkpoint, None if checkpoint is None else release_in(checkpoint)
        self._wanted = None if checkpoint is None else made_for(checkpoint)
        # The last of them answers new requests, the others those that they have begun to answer.
        self._served: list[_Served] = []
        # What is routed of the step that is running, and whether the engine reports its requests.
        self._routes: list[tuple[Memory, StepRoute]] = []
        self.follows_requests = False
        self._unanswered: list[str] = []

    @property
    def adds_rest(self) -> bool:
        """Whether the state behind a decoder layer is the sum of two tensors that it gives."""
        return self.reader.adds_rest

    @property
    def memory(self) -> Memory:
        """The memory that new requests are decided by."""
        return self._newest.memory

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return next(self.memory.buffers()).device

    @property
    def _newest(self) -> _Served:
        if not self._served:
            raise LostMemoryError(f"the edits are lost: the memory of {self.edited.module} was not loaded")
        return self._served[-1]

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the memory's tensors, by their names.

        Raises:
            LostMemoryError: some are not there.
        """
        missing = sorted(set(current_names(self.edited.memory["tensors"])) - set(tensors))
        if missing:
            raise LostMemoryError(f"this checkpoint lacks tensors ({', '.join(missing)}); copy it anew")
        self._serve(described_memory(self.edited.memory, tensors, device))

    def _serve(self, memory: Memory) -> None:
        pairs = memory.pairs if isinstance(memory, FactMemory) else None
        requests = Requests(self.decide, self.edited.marks, whole=memory.answers_prompts, pairs=pairs)
        self._served.append(_Served(memory, SubjectFilter(memory), requests))

    def admit(self, prompts: Mapping[str, Sequence[int]]) -> None:
        """Decide new requests, by the release that lies in the checkpoint's directory by now.

        Raises:
            LostMemoryError: nothing has loaded the memory.
        """
        if self._checkpoint is not None and prompts:
            self._look_for_release(self._checkpoint)
        self._newest.requests.admit(prompts)
        self._unanswered += [request for request in prompts if self.is_unanswered(request)]

    def take_unanswered(self) -> list[str]:
        """Return the requests since it was last asked that no edit answers."""
        taken, self._unanswered = self._unanswered, []
        return taken

    def _look_for_release(self, checkpoint: Path) -> None:
        """Serve the release in a directory if it is another than the last that was seen there."""
        found = self._processes.first(release_in(checkpoint))
        if found is None or found == self._seen:
            return
        self._seen = found
        memory = self._release(checkpoint, found)
        if self._processes.all_of(memory is not None) and memory is not None:
            self._serve(memory)
            _LOG.info("the memory in %s is served from now on", checkpoint)

    def _release(self, checkpoint: Path, found: str) -> Memory | None:
        """Return the memory of a new release, or ``None`` (and log why) if it cannot be served."""
        try:
            if self._wanted is None:
                raise ReleaseError("what is served does not say what it was made for")
            described, tensors = read_release(checkpoint, self._wanted)
            if release_in(checkpoint) != found:
                raise ReleaseError("it was replaced while it was read")
            return described_memory(described["memory"], tensors, self.device)
        except (ReleaseError, OSError, ValueError, KeyError, SafetensorError) as error:
            _LOG.error("the memory in %s is not served, the one before it is: %s", checkpoint, error)
            return None

    def forget(self, requests: Iterable[str]) -> None:
        """Forget requests that are done, and releases that answer none any more."""
        done = list(requests)
        for served in self._served:
            served.requests.forget(done)
        self._served = [served for served in self._served[:-1] if served.requests.answers_any] + self._served[-1:]

    def is_unanswered(self, request: str) -> bool:
        """Return whether a request is known that no edit answers."""
        return any(served.requests.decided(request) == UNROUTED for served in self._served)

    @torch.no_grad()
    def decide(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Decide whole prompts; return the memory that answers each and the index of its last token."""
        ids, real = padded(prompts)
        end = self.edited.marks.ends_in(ids, real)
        known = real & ~is_any(ids, self._placeholders)
        ids, there = windows(ids, known, end, self._window)
        memory = torch.full_like(end, UNROUTED)
        for rows in batches(there.sum(1)):
            width = int(there[rows].sum(1).max())
            memory[rows] = self._decided(*(tensor[rows, :width].to(self.device) for tensor in (ids, there))).cpu()
        return list(zip(memory.tolist(), end.tolist(), strict=True))

    def _decided(self, ids: Tensor, there: Tensor) -> Tensor:
        """Decide windows (B, W); return the memory that answers each (B,)."""
        memory = ids.new_full((len(ids),), UNROUTED)
        may = torch.tensor(self._newest.may_answer(ids, there)).nonzero().flatten().to(ids.device)
        if len(may):
            memory[may] = self._asked(ids[may], there[may])
        return memory

    def _asked(self, ids: Tensor, there: Tensor) -> Tensor:
        """Decide windows by their tokens' states; return the memory that answers each (B,)."""
        numbers = []
        for part in self.reader.parts(there.sum(1).tolist()):
            width = int(there[part].sum(1).max())
            own, known = ids[part, :width], there[part, :width]
            reading = WindowReading(self.memory, own, known)

            def take(states: Sequence[Tensor], reading: WindowReading = reading) -> Decision | None:
                return reading.take(nn.utils.rnn.pad_sequence(list(states), batch_first=True))

            decision = self.reader.run([row[mask] for row, mask in zip(own, known, strict=True)], take)
            numbers.append(self.memory.numbers(decision))
        return torch.cat(numbers)

    def begin(self, requests: Sequence[str], counts: Sequence[int], ids: Tensor, positions: Tensor) -> None:
        """Note what is routed of the step that begins; see :meth:`Requests.step`."""
        steps = [(served.memory, served.requests.step(requests, counts, ids, positions)) for served in self._served]
        self._routes = [(memory, route) for memory, route in steps if route is not None]

    def rest(self) -> None:
        """Note that no token is routed until the next step begins."""
        self._routes = []

    @torch.no_grad()
    def add_to(self, answer: Tensor, keys: Keys, *, real: bool) -> None:
        """Add residuals to the edited layer's answer (T, d), in place.

        Args:
            keys: what gives the keys (n, width) of tokens at some places (n,), and whether they are for this process.
            real: whether the tokens are those of requests, and not of a trial run.

        Raises:
            LostMemoryError: the engine does not report which requests the tokens belong to.
        """
        if not self.follows_requests and real:
            raise LostMemoryError("the edits are lost: this engine does not tell the memory of its requests")
        for memory, route in self._routes if real else ():
            mine, adds = keys(route.token)
            if not adds:
                continue
            chosen = memory.choices(mine[None], route.memory[None], route.tokens[None]).chosen
            answer[route.token] = memory.add(answer[route.token][None], mine[None], chosen)[0]


def memory_of(model: Any) -> ServedMemory:
    """Return the memory of a loaded model."""
    found: ServedMemory = model.wise_memory
    return found
