"""Models that do not fit in memory: their decoder layers stay in the checkpoint's files and pass through two buffers.

A streamed layer is empty (its parameters are on the meta device) but for the moment it runs. While it does, the next
one is read. Experts of a mixture are no part of that: one is read when tokens are sent to it, and as many stay as the
memory budget leaves room for, of the layer that runs and of those that are held. The model's own forward pass and
``generate()`` work as they are; a sweep (:mod:`wisecli.models.streaming.layer_sweep`) reads each layer once for many
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.module_tree import expert_parameters
from wisecli.models.streaming.expert_files import Assembly
from wisecli.models.streaming.expert_stream import Entries, Room, read_by_expert
from wisecli.models.streaming.layer_files import LayerFiles, Places, Stored, buffer_size, read, read_into
from wisecli.models.streaming.memory_budget import expert_rooms, in_hand, spool_share


@dataclass
class _Slot:
    """A buffer, what of it is on the model's device, and the layer that it holds."""

    host: Tensor
    there: Tensor
    layer: int | None = None


class LayerStream:
    """Runs a model's layers from its checkpoint, at most two of them in memory.

    Args:
        model: its layers' parameters are on the meta device.
        layers: module path of the list of layers.
        device: where layers run.
        budget: about how many bytes of memory there are.
        places: of parameters that do not lie in the checkpoint, or not by their own names.
        assembled: how parameters of experts are put together that lie nowhere as a whole.

    Attributes:
        spool_bytes: how much a sweep keeps in memory of what it carries from layer to layer.
        width: how long the tuples are that layers give; 0 where they give a tensor.
        written: directory of parameters that were assembled from several tensors; it is removed with the model.

    Raises:
        ModelError: a layer's tensors are not in the checkpoint as the model has them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        budget: int,
        places: Places | None = None,
        assembled: Mapping[str, Assembly] | None = None,
    ) -> None:
        found = model.get_submodule(layers)
        assert isinstance(found, nn.ModuleList)
        self.layers, self.device, self.budget, self.spool_bytes = found, device, budget, spool_share(budget)
        files, self._assembled = LayerFiles(checkpoint, places or {}), assembled or {}
        self._passing, self._staying = Room(), Room()
        self._experts = [self._entries(files, f"{layers}.{number}", layer) for number, layer in enumerate(found)]
        self._stored = [
            files.layer(f"{layers}.{number}", layer, self._experts[number]) for number, layer in enumerate(found)
        ]
        self._empty = [
            {part.name: layer.get_parameter(part.name) for part in stored}
            for layer, stored in zip(found, self._stored, strict=True)
        ]
        self.layer_bytes = max(map(buffer_size, self._stored))
        self._resident = sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)
        self._held: set[int] = set()
        self._filled: int | None = None
        self._slots: list[_Slot] = []
        self._pool = ThreadPoolExecutor(1, "wise-layers")
        self._coming: tuple[int, Future[_Slot]] | None = None
        self.width = 0
        self.written: Path | None = None
        # The next layer is read beside experts, and one counter would lose what both add to it at once.
        self._layers_read = self._experts_read = 0
        for number, layer in enumerate(found):
            layer.__dict__["forward"] = self._forward(number, layer)
            read_by_expert(layer, self._experts[number], device)
        self._share_room()

    @property
    def bytes_read(self) -> int:
        """How much was read of the layers, and of experts."""
        return self._layers_read + self._experts_read

    @property
    def streamed(self) -> list[int]:
        """Layers that are not in memory."""
        return [number for number in range(len(self.layers)) if number not in self._held]

    def hold(self, layers: Iterable[int]) -> None:
        """Read some layers into memory for good, but for experts that there is no room for."""
        self.release()
        for number in sorted(set(layers) - self._held):
            slot = self._new_slot(buffer_size(self._stored[number]))
            self._fill(number, self._read(number, slot, self._mark()))
            self.layers[number].__dict__.pop("forward", None)
            self._held.add(number)
            for entries in self._experts[number].values():
                entries.room = self._staying
        self._share_room()

    def release(self) -> None:
        """Free the buffers until a layer runs again."""
        if self._coming is not None:
            self._coming[1].exception()
        self._coming, self._slots = None, []
        self._passing.free()

    def _entries(self, files: LayerFiles, path: str, layer: nn.Module) -> dict[str, Entries]:
        """Return what reads a layer's experts, by the names of their parameters."""

        def reader(name: str, parameter: Tensor) -> Callable[[int], Tensor]:
            if (made := self._assembled.get(name)) is not None:
                return lambda number: made.joined(
                    [self._read_alone(files.tensor(part, parameter.dtype))] for part in made.of_expert(number)
                )[0].contiguous()
            whole = files.parameter(name, parameter)
            return lambda number: self._read_alone(whole.entry(number))

        return {
            name: Entries(parameter, reader(f"{path}.{name}", parameter), self._passing)
            for name, parameter in expert_parameters(layer).items()
        }

    def _read_alone(self, part: Stored) -> Tensor:
        self._experts_read += part.shape.numel() * part.stored.itemsize
        return read(part).to(self.device)

    def _share_room(self) -> None:
        """Let as many experts stay as there is room for: of the layer that runs, and of those that are held."""
        self._staying.free()
        held = sum(buffer_size(self._stored[number]) for number in self._held)
        largest = max(sum(entries.bytes for entries in found.values()) for found in self._experts)
        one = max(sum(entries.bytes // entries.shape[0] for entries in found.values()) for found in self._experts)
        weights = self._resident + held + 2 * self.layer_bytes + in_hand(one)
        self._passing.size, self._staying.size = expert_rooms(self.budget, weights, largest)

    @contextmanager
    def filled(self, number: int, then: int | None = None) -> Iterator[None]:
        """Hold a layer's parameters in memory within a ``with`` block.

        Args:
            then: the layer to read meanwhile.
        """
        if number in self._held or number == self._filled:
            yield
            return
        slot = self._slot(number)
        self._prefetch(then, slot)
        self._fill(number, slot)
        self._filled = number
        try:
            yield
        finally:
            self._filled = None
            self._passing.clear()
            self.layers[number].load_state_dict(self._empty[number], strict=False, assign=True)

    def _forward(self, number: int, layer: nn.Module) -> Callable[..., Any]:
        """Return a layer's forward pass that reads its weights first and frees them afterwards."""

        def forward(*args: Any, **named: Any) -> Any:
            given = (tensor for tensor in (*args, *named.values()) if isinstance(tensor, Tensor))
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
                raise RuntimeError(f"layer {number} is streamed and takes no gradient; hold it first")
            with self.filled(number, self._following(number)):
                return type(layer).forward(layer, *args, **named)

        return forward

    def _following(self, number: int) -> int:
        """Return the streamed layer that a whole pass needs next; after the last one that is the next pass' first."""
        streamed = self.streamed
        return next((other for other in streamed if other > number), streamed[0])

    def _slot(self, number: int) -> _Slot:
        """Return the buffer that holds a layer, and read it now if it was not read ahead."""
        if self._coming is not None:
            wanted, coming = self._coming
            self._coming = None
            if wanted == number:
                return coming.result()
            coming.exception()
        ready = next((slot for slot in self._slots if slot.layer == number), None)
        return ready or self._read(number, self._free(None), self._mark())

    def _prefetch(self, number: int | None, busy: _Slot) -> None:
        if number is None or any(slot.layer == number for slot in self._slots) or number in self._held:
            return
        self._coming = number, self._pool.submit(self._read, number, self._free(busy), self._mark())

    def _free(self, busy: _Slot | None) -> _Slot:
        if len(self._slots) < 2:
            self._slots.append(self._new_slot(self.layer_bytes))
            return self._slots[-1]
        return next(slot for slot in self._slots if slot is not busy)

    def _new_slot(self, size: int) -> _Slot:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return _Slot(host, host if self.device.type == "cpu" else torch.empty_like(host, device=self.device))

    def _mark(self) -> torch.cuda.Event | None:
        """Return the event that a buffer's next content waits for: the end of what is computed with its last."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _read(self, number: int, slot: _Slot, after: torch.cuda.Event | None) -> _Slot:
        """Read a layer's weights into a slot, and copy them to the device once ``after`` has passed."""
        slot.layer = None
        for part in self._stored[number]:
            self._layers_read += read_into(part, slot.host[part.offset : part.offset + part.bytes])
        if self.device.type == "cuda":
            side = torch.cuda.Stream(self.device)
            with torch.cuda.stream(side):
                if after is not None:
                    side.wait_event(after)
                slot.there.copy_(slot.host, non_blocking=True)
            side.synchronize()
        elif slot.there is not slot.host:
            slot.there.copy_(slot.host)
        slot.layer = number
        return slot

    def _fill(self, number: int, slot: _Slot) -> None:
        views = {
            part.name: slot.there[part.offset : part.offset + part.bytes].view(part.dtype).view(part.shape)
            for part in self._stored[number]
        }
        self.layers[number].load_state_dict(views, strict=False, assign=True)
